"""docs/method.md names functions that exist, and each of its formulas names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/method.md").read_text()
REFERENCES = sorted({(path, name) for name, path in re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", PAGE)})


def names(path: Path) -> set[str]:
    """The names that a module defines, with those of its classes below them."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
    return found


@pytest.mark.parametrize(("path", "name"), REFERENCES, ids=lambda part: part)
def test_a_reference_exists(path: str, name: str) -> None:
    assert name in names(ROOT / path)


def test_each_formula_has_a_function_beside_it() -> None:
    blocks = PAGE.split("\n\n")
    formulas = [i for i, block in enumerate(blocks) if block.startswith("```math")]
    assert len(formulas) > 25
    for i in formulas:
        beside = "".join(blocks[max(i - 1, 0) : i + 3])
        assert ".py)" in beside, blocks[i]


def test_sources_are_numbered_in_order_and_all_used() -> None:
    text, sources = PAGE.split("\n## Sources\n")
    prose = re.sub(r"```math.*?```|\$`.*?`\$", "", text, flags=re.DOTALL)
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", sources, re.MULTILINE)]
    used = {
        int(n)
        for found in re.findall(r"\[(\d[^\]]*)\](?!\()", prose)
        for n in re.findall(r"(?<![\w.])\d+(?![.\d])", found)
    }
    assert numbers == list(range(1, len(numbers) + 1))
    assert used == set(numbers)
