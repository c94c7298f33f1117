"""Removing features from embeddings, the residual kept.

With e a unit embedding, z its activations, D the decoder, S the features to remove:

- zero: e' = norm(e - sum_{j in S} z_j d_j)
- mean: e' = norm(e + sum_{j in S} (m_j - z_j) d_j), m_j the mean activation over a corpus
- project: e' = norm((I - U U^T) e), U = orth({d_j : j in S})

What the dictionary does not explain of e stays in all three. Source: arXiv 2502.14888, section on gender; the
residual and the other two modes are additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from services.bias.activations import SparseActivations, decode_part
from services.bias.gender import unit

# Directions whose singular value is under this share of the largest add nothing but float32's rounding.
RANK_TOLERANCE = 1e-5


class Mode(StrEnum):
    """What becomes of the removed features."""

    ZERO = "zero"
    MEAN = "mean"
    PROJECT = "project"
    LEACE = "leace"


@dataclass(frozen=True)
class Side:
    """One dictionary in one modality.

    Attributes
    ----------
    rows : float32 array, shape (n, d)
        D.
    means : float32 array, shape (n,)
        Mean activation of each feature over a corpus, inputs on which it is silent included.
    """

    rows: Float[np.ndarray, "n d"]
    means: Float[np.ndarray, " n"]


class Ablator(Protocol):
    """Anything that takes gender, or something else, out of embeddings of one modality."""

    def __call__(self, e: Float[np.ndarray, "batch d"], z: SparseActivations) -> Float[np.ndarray, "batch d"]:
        """Return unit embeddings after the removal; a row of which nothing is left is zero."""


class FeatureAblation:
    """Removes a set of features, in one modality.

    Parameters
    ----------
    side : Side
        The dictionary.
    features : int array, shape (s,)
        S, distinct.
    mode : Mode
        ZERO, MEAN or PROJECT.
    """

    def __init__(self, side: Side, features: Int[np.ndarray, " s"], mode: Mode) -> None:
        self.features = features
        self.mode = mode
        self._rows = side.rows
        self._removed = np.zeros(len(side.rows), bool)
        self._removed[features] = True
        self._shift = side.means[features] @ side.rows[features] if mode is Mode.MEAN else None
        self._basis = row_basis(side.rows[features]) if mode is Mode.PROJECT else None

    def __call__(self, e: Float[np.ndarray, "batch d"], z: SparseActivations) -> Float[np.ndarray, "batch d"]:
        """Return e' of unit embeddings `e` with activations `z`, shape (batch, n)."""
        if self._basis is not None:
            return unit(e - (e @ self._basis) @ self._basis.T)
        changed = e - self.part(z)
        if self._shift is not None:
            changed = changed + self._shift
        return unit(changed)

    def part(self, z: SparseActivations) -> Float[np.ndarray, "batch d"]:
        """Return sum_{j in S} z_j d_j."""
        return decode_part(z, self._removed, self._rows)

    def active(self, z: SparseActivations) -> NDArray[np.int64]:
        """Return how many features of S each input activates, int64 (batch,)."""
        hits = (self._removed[z.indices] & (z.data != 0)).astype(np.int64)
        counted: NDArray[np.int64] = np.diff(np.concatenate([[0], np.cumsum(hits)])[z.indptr])
        return counted


def row_basis(rows: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "d r"]:
    """Return U, an orthonormal basis of the span of `rows`, r <= min(s, d), float32."""
    left, singular, _ = np.linalg.svd(rows.T.astype(np.float64), full_matrices=False)
    basis: NDArray[np.float32] = left[:, singular > RANK_TOLERANCE * singular.max(initial=0)].astype(
        np.float32
    )
    return basis


def retained(
    e: Float[np.ndarray, "batch d"], changed: Float[np.ndarray, "batch d"]
) -> Float[np.ndarray, " batch"]:
    """Return the cosine of each unit embedding and what an ablation left of it, 0 where it left nothing."""
    cosine: NDArray[np.float32] = np.einsum("bd,bd->b", e, changed)
    return cosine
