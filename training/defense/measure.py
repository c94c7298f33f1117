"""Figures with their intervals."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from services.intervals import area_under_roc, mean_interval

RESAMPLES = 1_000

# {"value", "low", "high"}: a figure and its 95% interval over concepts, or over images where those are not told.
Figure: TypeAlias = dict[str, float]


def mean(values: np.ndarray, concepts: np.ndarray | None = None, seed: int = 0) -> Figure:
    """Return the mean of one value an image; of booleans it is a share, whose interval at 0 and 1 is exact."""
    value, low, high = mean_interval(np.asarray(values), concepts, RESAMPLES, seed)
    return {"value": value, "low": low, "high": high}


def auroc(clean: Float[np.ndarray, " c"], attacked: Float[np.ndarray, " a"]) -> Figure:
    """Return the probability that an attacked image scores over a clean one."""
    attack = np.repeat([False, True], [len(clean), len(attacked)])
    area = area_under_roc(np.concatenate([clean, attacked]), attack)
    return {"value": area.value, "low": area.low, "high": area.high}


def correct(unit: Float[np.ndarray, "B d"], texts: Float[np.ndarray, "L d"], truth: np.ndarray) -> np.ndarray:
    """Return whether the nearest text of each embedding is the true one."""
    result: np.ndarray = (unit @ texts.T).argmax(1) == truth
    return result
