"""The study's plots: professions before and after, the null's range, the threshold curve."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from training.report.plots import STYLE, to_svg

BEFORE, AFTER, NULL = "#0072B2", "#D55E00", "#999999"


def professions(found: dict[str, Any], title: str) -> str:
    """Plot P(woman) of each ungendered profession before and after the ablation, with intervals."""
    rows = [row for row in found["professions"] if row["p_woman"]["before"]["value"] is not None]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 0.22 * len(rows) + 0.9))
        place = np.arange(len(rows))
        for key, colour, shift in (("before", BEFORE, -0.15), ("after", AFTER, 0.15)):
            value = np.array([row["p_woman"][key]["value"] for row in rows])
            low = np.array([_or(row["p_woman"][key]["low"], v) for row, v in zip(rows, value, strict=True)])
            high = np.array([_or(row["p_woman"][key]["high"], v) for row, v in zip(rows, value, strict=True)])
            axis.hlines(place + shift, low, high, color=colour, linewidth=1)
            axis.plot(value, place + shift, "o", color=colour, markersize=3.5, label=key)
        axis.axvline(0.5, color="#888888", linewidth=0.8)
        axis.set_yticks(place, [row["profession"] for row in rows])
        axis.set_xlim(0, 1)
        axis.invert_yaxis()
        axis.set_xlabel("P(woman) of the ungendered")
        axis.set_title(title, fontsize=9)
        axis.legend(frameon=False, fontsize=8)
        return to_svg(figure)


def nulls(audits: list[dict[str, Any]]) -> str:
    """Plot for each ablation its change against the range of the random sets' changes, one panel a measure."""
    tested = [found for found in audits if found["nulls"]]
    measures = sorted({test["measure"] for found in tested for test in found["nulls"]})
    if not measures:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(measures), figsize=(3.2 * len(measures), 0.3 * len(tested) + 0.9))
        for axis, measure in zip(np.atleast_1d(axes), measures, strict=True):
            for place, found in enumerate(tested):
                test = next((t for t in found["nulls"] if t["measure"] == measure), None)
                if test is None:
                    continue
                axis.hlines(place, test["null"][0], test["null"][-1], color=NULL, linewidth=1)
                axis.hlines(place, test["null"][1], test["null"][-2], color=NULL, linewidth=4)
                axis.plot(test["observed"], place, "D", color=AFTER, markersize=4)
            axis.axvline(0, color="#888888", linewidth=0.8)
            axis.set_yticks(np.arange(len(tested)), [found["method"] for found in tested], fontsize=7)
            axis.invert_yaxis()
            axis.locator_params(axis="x", nbins=4)
            axis.set_title(f"change of {measure.replace('_', ' ')}", fontsize=9)
        figure.tight_layout()
        return to_svg(figure)


def threshold(found: dict[str, Any]) -> str:
    """Plot both recalls over the threshold, before and after."""
    curve = np.array(found["curve"])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.2, 2.4))
        for column, colour, dash, label in (
            (1, BEFORE, "-", "women, before"),
            (2, BEFORE, "--", "men, before"),
            (3, AFTER, "-", "women, after"),
            (4, AFTER, "--", "men, after"),
        ):
            axis.plot(curve[:, 0], curve[:, column], dash, color=colour, linewidth=1.2, label=label)
        axis.set_xlabel("threshold on the score")
        axis.set_ylabel("recall")
        axis.legend(frameon=False, fontsize=7)
        return to_svg(figure)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
