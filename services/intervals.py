"""Intervals that hold where a percentile bootstrap does not: at 0 and 1, and for ranks of items that come in groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import rankdata, t

LEVEL = 0.95


def exact_end(units: int, level: float = LEVEL) -> float:
    """Return how far the interval of a share reaches that is 0 or 1 in all of `units` independent units.

    Clopper and Pearson's interval of `units` out of `units` is [(alpha / 2)^(1 / units), 1]: 64 of 64 is 94% to 100%,
    where a bootstrap, which only ever draws what is there, says [1, 1]. Returned is the distance from the share, 1
    minus that bound; 1 without units.
    """
    return 1.0 - float(((1 - level) / 2) ** (1 / units)) if units > 0 else 1.0


def group_bootstrap(
    values: NDArray[np.float64], groups: NDArray[np.int64] | None = None, resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Return bootstrap replicates of column means, resampling whole groups, shape (resamples, columns).

    Parameters
    ----------
    values : float array, shape (N, columns)
        One row an item.
    groups : int or str array, shape (N,), or None
        Items that are not independent share a value; None is each by itself.
    resamples, seed : int
        Of the bootstrap.
    """
    codes = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(codes.max()) + 1
    size = np.bincount(codes, minlength=count)
    sums = np.stack([np.bincount(codes, column, minlength=count) for column in values.T], axis=1)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    means: NDArray[np.float64] = (drawn @ sums) / (drawn @ size)[:, None]
    return means


def mean_interval(
    values: NDArray[np.float64] | NDArray[np.bool_],
    groups: NDArray[np.int64] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Return the mean with its percentile bootstrap interval over groups.

    Of booleans it is a share: at 0 and 1, where a bootstrap has nothing to draw, its interval is `exact_end`'s.
    """
    numbers = np.asarray(values, np.float64)
    value = float(numbers.mean())
    if np.asarray(values).dtype == np.bool_ and value in (0.0, 1.0):
        end = exact_end(len(values) if groups is None else len(np.unique(groups)), level)
        return value, value - end * (value == 1), value + end * (value == 0)
    tail = (1 - level) / 2
    low, high = np.quantile(group_bootstrap(numbers[:, None], groups, resamples, seed), [tail, 1 - tail])
    return value, float(low), float(high)


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve.

    Attributes
    ----------
    value, low, high : float
        In [0, 1], with its interval; NaN where either class is missing.
    units : int
        Groups that hold a positive: what the interval rests on.
    """

    value: float
    low: float
    high: float
    units: int


def area_under_roc(
    score: NDArray[np.float64],
    positive: NDArray[np.bool_],
    groups: NDArray[np.int64] | None = None,
    level: float = LEVEL,
) -> Area:
    """Return P(score of a positive > score of a negative), ties counting half, with an interval by group.

    The interval is Student's on the logit, with the variance of sums over groups; where the area is 0 or 1, which has
    no variance, it is `exact_end` of the groups of the rarer class.

    Parameters
    ----------
    score : float array, shape (N,)
        Larger for positives.
    positive : bool array, shape (N,)
        The class.
    groups : int array, shape (N,), or None
        Items that are not independent share a number; None is each by itself.
    level : float
        Coverage of the interval.

    References
    ----------
    Obuchowski, "Nonparametric analysis of clustered ROC curve data" (1997).
    """
    m, n = int(positive.sum()), int((~positive).sum())
    codes = np.arange(len(score)) if groups is None else np.unique(groups, return_inverse=True)[1]
    units, others = (len(np.unique(codes[of])) for of in (positive, ~positive))
    if m == 0 or n == 0:
        return Area(float("nan"), float("nan"), float("nan"), units)
    ranks = rankdata(score)
    # Of each item, the share of the other class that lies on its right side.
    placement = np.empty(len(score))
    placement[positive] = (ranks[positive] - rankdata(score[positive])) / n
    placement[~positive] = 1 - (ranks[~positive] - rankdata(score[~positive])) / m
    value = float(placement[positive].mean())
    if value in (0.0, 1.0):
        end = exact_end(min(units, others), level)
        return Area(value, value - end * (value == 1), value + end * (value == 0), units)
    if units < 2:
        return Area(value, 0.0, 1.0, units)
    residual = placement - value
    sums = [np.bincount(codes, residual * of) for of in (positive, ~positive)]
    total = codes.max() + 1
    variance = (
        units / (units - 1) * (sums[0] ** 2).sum() / m**2
        + others / max(others - 1, 1) * (sums[1] ** 2).sum() / n**2
        + 2 * total / (total - 1) * (sums[0] * sums[1]).sum() / (m * n)
    )
    spread = np.sqrt(max(variance, 0.0)) / (value * (1 - value))
    reach = t.ppf((1 + level) / 2, units - 1) * spread
    low, high = expit(logit(value) + np.array([-reach, reach]))
    return Area(value, float(low), float(high), units)
