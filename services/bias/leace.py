"""LEACE: the least change to embeddings after which no linear classifier can tell a concept.

Source: Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (arXiv 2306.03819), theorem 4.3. For a
concept of two classes the projection has rank one, so two vectors and a mean are the whole eraser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from services.bias.activations import SparseActivations
from services.bias.gender import unit

# Directions with a share of the largest variance under this are null directions of the data, as in the paper's Sigma^+.
VARIANCE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Leace:
    """r(x) = x - u <v, x - mean>, with u = W^+ p, v = W p, W = Sigma^(-1/2), p = W Sigma_xz / ||W Sigma_xz||.

    Attributes
    ----------
    u, v, mean : float32 arrays, shape (d,)
        As above.
    """

    u: Float[np.ndarray, " d"]
    v: Float[np.ndarray, " d"]
    mean: Float[np.ndarray, " d"]

    @classmethod
    def fit(cls, e: Float[np.ndarray, "batch d"], woman: Bool[np.ndarray, " batch"]) -> Leace:
        """Fit on embeddings of which each shows a woman or a man.

        Parameters
        ----------
        e : float array, shape (N, d)
            Embeddings of one modality.
        woman : bool array, shape (N,)
            Both values must occur.
        """
        x = e.astype(np.float64)
        mean = x.mean(0)
        centred = x - mean
        variances, axes = np.linalg.eigh(centred.T @ centred / len(x))
        large = variances > VARIANCE_TOLERANCE * variances[-1]
        variances, axes = variances[large], axes[:, large]
        # Sigma_xz up to its sign and scale, which p does not depend on.
        gap = axes.T @ (x[woman].mean(0) - x[~woman].mean(0))
        whitened = gap / np.sqrt(variances)
        p = whitened / np.linalg.norm(whitened)
        u, v = axes @ (np.sqrt(variances) * p), axes @ (p / np.sqrt(variances))
        return cls(u.astype(np.float32), v.astype(np.float32), mean.astype(np.float32))

    def raw(self, e: Float[np.ndarray, "batch d"]) -> Float[np.ndarray, "batch d"]:
        """Return r(e), not normalised: the theorem is about these."""
        erased: Float[np.ndarray, "batch d"] = e - ((e - self.mean) @ self.v)[:, None] * self.u
        return erased

    def __call__(self, e: Float[np.ndarray, "batch d"], z: SparseActivations) -> Float[np.ndarray, "batch d"]:
        """Return norm(r(e)); `z` is not used."""
        return unit(self.raw(e))
