"""Which ablation the bias study reports.

The ablation that is reported is, among those that keep 95% of the retrieval of drawings that show no people, the one
whose audit on held-out drawings has the strongest verdict, then the fewest harms; then the one after which a classifier
that is trained anew tells the genders least, on drawings and texts. Where that can be trained on drawings or on texts
only, theirs alone count; where on neither, the AUC nearest to 0.5. The figures say which it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.bias.audit import Verdict
from services.errors import NotEnoughItems

KEEP = 0.95
SIDES = ("image", "text")
# What may choose, the first that is defined, and its value where no gender is left.
AIMS = {"probe": 0.5, "auc": 0.5}
# The weakest first.
STRENGTH = (
    Verdict.NO_EFFECT, Verdict.THRESHOLD_ONLY, Verdict.NOT_SPECIFIC, Verdict.SILENCED, Verdict.EFFECT,
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The ablation that is reported.

    Attributes
    ----------
    method : str
        Its name.
    figure : str
        What chose it among those of the strongest verdict: one of `AIMS`, or "r1_kept" where no ablation keeps enough.
    sides : tuple of str
        "image" and "text", or the one of them on which the figure is defined; none for "r1_kept".
    """

    method: str
    figure: str
    sides: tuple[str, ...]


def enough_kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the feature ablations that keep enough of the retrieval of drawings that show no people."""
    return [row for row in rows if row["features"] and row["r1_kept"] >= KEEP]


def choose(rows: list[dict[str, Any]], audits: Mapping[str, Mapping[str, Any]]) -> Choice:
    """Return the feature ablation of the rule in this module's docstring; the least loss where none keeps enough.

    Parameters
    ----------
    rows
        Quick figures of all methods.
    audits
        By name, "verdict" and "harms" of those that keep enough.

    Raises
    ------
    NotEnoughItems
        Where no figure that could choose is defined.
    """
    enough = enough_kept(rows)
    if not enough:
        ablations = [row for row in rows if row["features"]]
        return Choice(max(ablations, key=lambda row: row["r1_kept"])["method"], "r1_kept", ())
    figure, sides = criterion(enough)

    def rank(row: dict[str, Any]) -> tuple[int, int, float]:
        found = audits[row["method"]]
        strength = STRENGTH.index(Verdict(found["verdict"]))
        return -strength, len(found["harms"]), distance(row, figure, sides)

    return Choice(min(enough, key=rank)["method"], figure, sides)


def criterion(rows: list[dict[str, Any]]) -> tuple[str, tuple[str, ...]]:
    """Return the first of `AIMS` that every row has on some side, and those sides."""
    for figure in AIMS:
        # The smallest of NaNs is the first, whatever it is.
        sides = tuple(side for side in SIDES if not any(math.isnan(row[side][figure]) for row in rows))
        if sides:
            return figure, sides
    raise NotEnoughItems(f"no ablation can be chosen: none of {', '.join(AIMS)} is defined")


def distance(row: dict[str, Any], figure: str, sides: Sequence[str]) -> float:
    """Return how far a figure is from where no gender is left, summed over sides."""
    return float(sum(abs(row[side][figure] - AIMS[figure]) for side in sides))
