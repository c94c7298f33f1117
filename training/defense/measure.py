"""Figures with their intervals."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

RESAMPLES = 1_000

# {"value", "low", "high"}: a figure and its 95% bootstrap interval over images.
Figure: TypeAlias = dict[str, float]


def mean(values: np.ndarray, seed: int = 0) -> Figure:
    """Return the mean of one value an image."""
    values = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return _figure(values.mean(), values[draws].mean(1))


def auroc(clean: Float[np.ndarray, " c"], attacked: Float[np.ndarray, " a"], seed: int = 0) -> Figure:
    """Return the probability that an attacked image scores over a clean one."""
    rng = np.random.default_rng(seed)
    draws = [_wins(rng.choice(clean, len(clean)), rng.choice(attacked, len(attacked))) for _ in range(200)]
    return _figure(_wins(clean, attacked), np.array(draws))


def _wins(clean: np.ndarray, attacked: np.ndarray) -> float:
    """Return the Mann-Whitney statistic as a share: ties count half."""
    ranks = rankdata(np.r_[clean, attacked])[len(clean) :]
    count = len(attacked)
    return float((ranks.sum() - count * (count + 1) / 2) / (len(clean) * count))


def _figure(value: float, draws: np.ndarray) -> Figure:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def correct(unit: Float[np.ndarray, "B d"], texts: Float[np.ndarray, "L d"], truth: np.ndarray) -> np.ndarray:
    """Return whether the nearest text of each embedding is the true one."""
    result: np.ndarray = (unit @ texts.T).argmax(1) == truth
    return result
