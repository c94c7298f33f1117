"""Whether memory grows: the one verdict of the soak and of the leak test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Allocators and caches fill up in this first share of a run; after it, memory should stand still.
WARM_UP = 1 / 3
# More than this is a leak: 5% is the noise of allocators over minutes, seen on servers that do not leak.
MOST_GROWTH = 0.05


def growth(samples: Sequence[float]) -> float:
    """Return by what share memory grew after warm-up.

    Parameters
    ----------
    samples
        Resident memory at even intervals, any unit; at least 9.

    Returns
    -------
    The median of the last third over the median of the middle third, less 1. Medians, because one large request
    lifts a single sample.
    """
    if len(samples) < 9:
        raise ValueError(f"{len(samples)} samples say nothing about growth")
    warm = np.asarray(samples[int(len(samples) * WARM_UP) :], float)
    half = len(warm) // 2
    return float(np.median(warm[half:]) / np.median(warm[:half]) - 1)
