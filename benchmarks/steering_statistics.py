"""Statistics of the steering benchmark: intervals, the interaction's permutation test, dose response, its plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from training.towers.retrieval import bootstrap_mean

Changes = dict[str, Float[np.ndarray, " pairs"]]

SEMANTIC = ("semantic",)
LOW_LEVEL = ("low-level",)
# "Monotone": what the protocol calls a dose response.
MONOTONE = 0.9


def effects(found: dict[str, Changes]) -> dict[str, dict[str, Any]]:
    """Return the mean change and its 95% bootstrap interval over pairs, by group and measure."""
    return {
        group: {name: asdict(bootstrap_mean(values)) for name, values in changes.items()}
        for group, changes in found.items()
    }


def kinds(a: Changes, b: Changes) -> tuple[np.ndarray, np.ndarray]:
    """Return the low-level and the semantic change of two groups, in units that make them comparable.

    Each measure is divided by its deviation over both groups, then averaged within its kind.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Low-level and semantic, float64 [2, pairs].
    """
    result = []
    for names in (LOW_LEVEL, SEMANTIC):
        scaled = []
        for name in names:
            both = np.stack([a[name], b[name]])
            scaled.append(both / max(both.std(), 1e-12))
        result.append(np.mean(scaled, axis=0))
    return result[0], result[1]


def interaction(a: Changes, b: Changes, permutations: int = 10000, seed: int = 0) -> dict[str, float]:
    """Test whether group `a` acts more on low-level measures, relative to semantic ones, than group `b`.

    The statistic is the mean over pairs of (low a - low b) - (semantic a - semantic b). Under the null hypothesis the
    two groups are exchangeable within a pair, so signs are flipped at random; two-sided.

    Returns
    -------
    dict[str, float]
        "value" with its 95% bootstrap interval "low" and "high", "p", and the two halves "low_level" and "semantic":
        a - b of each.
    """
    low, semantic = kinds(a, b)
    each = (low[0] - low[1]) - (semantic[0] - semantic[1])
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(permutations, len(each)))
    null = signs @ each / len(each)
    value = float(each.mean())
    # The observed order counts as one of the permutations (Phipson and Smyth, 2010).
    p = (1 + int((np.abs(null) >= abs(value)).sum())) / (permutations + 1)
    interval = bootstrap_mean(each)
    return {
        "value": value,
        "low": interval.low,
        "high": interval.high,
        "p": float(p),
        "low_level": float((low[0] - low[1]).mean()),
        "semantic": float((semantic[0] - semantic[1]).mean()),
    }


def dose_response(found: dict[float, Changes]) -> dict[str, dict[str, float]]:
    """Return for each measure how many pairs respond monotonically, no change at dose 0 included.

    Returns
    -------
    dict[str, dict[str, float]]
        "monotone": share of pairs with Spearman's rho of at least `MONOTONE`; "median": the median rho.
    """
    doses = [0.0, *sorted(found)]
    result = {}
    for name in next(iter(found.values())):
        curves = np.stack([np.zeros(len(found[doses[1]][name])), *(found[d][name] for d in doses[1:])])
        rho = np.array([spearmanr(doses, curve).statistic if np.ptp(curve) else 0.0 for curve in curves.T])
        result[name] = {"monotone": float((rho >= MONOTONE).mean()), "median": float(np.median(rho))}
    return result


def plot(found: dict[str, dict[float, Changes]], path: Path) -> None:
    """Draw the mean change against the dose, one panel a measure, with 95% bootstrap intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(next(iter(found.values())).values())))
    figure, axes = pyplot.subplots(1, len(names), squeeze=False, figsize=(9, 4), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for group, by_dose in found.items():
            doses = sorted(by_dose)
            means = [bootstrap_mean(by_dose[d][name], 200) for d in doses]
            axis.plot([0, *doses], [0, *(m.value for m in means)], marker="o", label=group)
            axis.fill_between(
                [0, *doses], [0, *(m.low for m in means)], [0, *(m.high for m in means)], alpha=0.15
            )
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("dose")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
