"""Which features go with gender: what is known of each, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray


@dataclass(frozen=True)
class Association:
    """How each feature goes with gender in one modality.

    Attributes
    ----------
    value, low, high : float64 arrays, shape (n,)
        Correlation of activation and "is a woman", in [-1, 1], and its 95% bootstrap interval over clusters; above 0
        the feature fires more for women. 0 where the feature never fires.
    share : float64 array, shape (n,)
        Its part of the gap between the genders' mean scores: (E_F z_j - E_M z_j) <d_j, t_F - t_M> over the whole gap.
        The parts of all features and of the residual add up to 1.
    """

    value: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]
    share: Float[np.ndarray, " n"]

    @property
    def strength(self) -> Float[np.ndarray, " n"]:
        """How far the interval stays from 0; negative where it holds 0."""
        strength: NDArray[np.float64] = np.maximum(self.low, -self.high)
        return strength


def rank_by_association(sides: Sequence[Association]) -> Int[np.ndarray, " n"]:
    """Return the features, most associated first: by the end of the interval nearer 0, in the clearer modality."""
    strength = np.max([side.strength for side in sides], axis=0)
    order: NDArray[np.int64] = np.argsort(-strength, kind="stable")
    return order
