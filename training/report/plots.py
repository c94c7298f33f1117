"""The report's plots, as SVG text that a page can hold."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from matplotlib.figure import Figure  # noqa: E402

# Okabe and Ito's palette: told apart by everyone.
COLOURS = {
    "neurons": "#999999",
    "sae": "#0072B2",
    "sae-group": "#D55E00",
    "sae-pair": "#009E73",
    "ncl": "#CC79A7",
    "embeddings": "#000000",
}
LABEL_COLOURS = {
    "IMAGE": "#0072B2",
    "CROSS": "#009E73",
    "TEXT": "#E69F00",
    "UNRESOLVED": "#BBBBBB",
    "DEAD": "#EEEEEE",
}
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "svg.fonttype": "none",
    "svg.hashsalt": "monofacet",
}


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element, the same bytes for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def mds_histograms(summaries: Mapping[str, Any]) -> str:
    """Plot the distribution of the energy MDS over live features, one panel a dictionary."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(summaries), figsize=(2.3 * len(summaries), 2.0), sharex=True)
        for axis, (name, summary) in zip(np.atleast_1d(axes), summaries.items(), strict=True):
            counts = np.array(summary["mds_histogram"])
            edges = np.linspace(0, 1, len(counts) + 1)
            share = counts / max(counts.sum(), 1)
            axis.bar(edges[:-1], share, np.diff(edges), align="edge", color=COLOURS.get(name, "#555555"))
            axis.set_title(name, fontsize=9)
            axis.set_xticks([0, 0.5, 1], ["text", "both", "image"])
            axis.axvline(0.25, color="#888888", lw=0.6, ls=":")
            axis.axvline(0.75, color="#888888", lw=0.6, ls=":")
        np.atleast_1d(axes)[0].set_ylabel("share of features")
        return to_svg(figure)


def label_bars(summaries: Mapping[str, Any]) -> str:
    """Plot the share of each label by dictionary."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 0.42 * len(summaries) + 0.7))
        names = list(summaries)[::-1]
        left = np.zeros(len(names))
        for label, colour in LABEL_COLOURS.items():
            share = np.array([summaries[name]["labels"][label] for name in names])
            axis.barh(names, share, left=left, color=colour, label=label, height=0.65)
            left += share
        axis.set_xlim(0, 1)
        axis.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
        return to_svg(figure)


def monosemanticity_curves(summaries: Mapping[str, Any]) -> str:
    """Plot EmbSim and WinRate against m, of features and of embeddings as features, with intervals over features."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(11.5, 2.5))
        panels = [(side, measure) for measure in ("emb_sim", "win_rate") for side in ("image", "text")]
        titles = {"emb_sim": "EmbSim", "win_rate": "WinRate"}
        for axis, (side, measure) in zip(axes, panels, strict=True):
            scores = {name: summary["monosemanticity"][side] for name, summary in summaries.items()}
            scores["embeddings"] = next(iter(scores.values()))["embeddings"]
            for i, (name, score) in enumerate(scores.items()):
                found = {m: v for m, v in score[measure].items() if v["features"]}
                m = np.array([int(key) for key in found]) + 0.5 * (i - 2)
                mean, low, high = (np.array([v[k] for v in found.values()]) for k in ("mean", "low", "high"))
                axis.errorbar(
                    m,
                    mean,
                    [mean - low, high - mean],
                    color=COLOURS[name],
                    marker="o",
                    ms=3,
                    lw=1,
                    label=name,
                )
            chance = 0.5
            if measure == "emb_sim":
                chance = next(iter(summaries.values()))["monosemanticity"][side]["random"]
            axis.axhline(chance, color="#888888", lw=0.7, ls=":")
            axis.set_title(f"{titles[measure]}, {side}s", fontsize=9)
            axis.set_xticks([10, 20, 30, 50])
            axis.set_xlabel("m")
        axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return to_svg(figure)
