"""The rows of pairs that a build skips: their list, and how many there may be."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.build.errors import BuildError
from training.build.settings import BuildSettings

BAD_ROWS = "bad_rows.csv"


def check_bad_share(bad: Sequence[Sequence[Any]], good: int, settings: BuildSettings) -> None:
    """Raise BuildError where more rows are bad than a user may be expected to know of.

    Parameters
    ----------
    bad : sequence of [source, row, key, reason]
        Listed in the file of bad rows.
    good : int
        Pairs that can be used, or may be.
    settings : BuildSettings
        With the largest share.
    """
    reasons = Counter(str(row[3]) for row in bad)
    where = f"{settings.work / BAD_ROWS} says why"
    if not good:
        raise BuildError(f"no row of the pairs can be used; {where}{_most(reasons)}")
    share = len(bad) / (len(bad) + good)
    if share > settings.max_bad_share:
        raise BuildError(
            f"{len(bad)} of {len(bad) + good} rows cannot be used, {share:.1%}, and --max-bad-share is "
            f"{settings.max_bad_share:.1%}; {where}{_most(reasons)}"
        )


def _most(reasons: Counter[str]) -> str:
    return f"; most often: {reasons.most_common(1)[0][0]}" if reasons else ""


def write_bad_rows(rows: Sequence[Sequence[Any]], path: Path) -> None:
    """List rows that are skipped: source, row, key and reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "row", "key", "reason"])
        writer.writerows(rows)
