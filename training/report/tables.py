"""A table of a study's figures, for Markdown and for the bundle's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FigureTable:
    """A title, column names, and rows of cells."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return it in Markdown, the title as a heading."""
        lines = [self.head, ["---"] * len(self.head), *self.body]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_markdown(summary: str, tables: Sequence[FigureTable]) -> str:
    """Return a study in Markdown: its summary, then its tables."""
    return "\n\n".join([summary, *(table.markdown() for table in tables)]) + "\n"
