"""The association of every feature with gender: what is known of each, how it is computed, and their order.

The gateway reads associations from the bundle and must not load scipy, so only what computes them imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

if TYPE_CHECKING:
    from services.modality.scores import Activations

# Resamples drawn at once: bounds the memory of (block x features) sums.
BLOCK = 50


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


def associate(
    z: Activations,
    woman: Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"],
    contribution: Float[np.ndarray, " features"],
    gap: float,
    resamples: int = 1000,
    seed: int = 0,
) -> Association:
    """Associate every feature with gender.

    Parameters
    ----------
    z : activations, shape (N, n)
        Of gendered items of one modality.
    woman : bool array, shape (N,)
        Which items are of women; both genders must occur.
    cluster : int array, shape (N,)
        Items that are not independent share a number; resamples draw clusters.
    contribution : float array, shape (n,)
        <d_j, t_F - t_M>: what a unit of activation adds to the score.
    gap : float
        The women's mean score minus the men's.
    resamples, seed : int
        Of the bootstrap.
    """
    sums = _cluster_sums(z, woman, cluster)
    value = _correlation(*(part.sum(0, keepdims=True) for part in sums))[0]
    rng = np.random.default_rng(seed)
    clusters = len(sums[0])
    draws = []
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)
        draws.append(_correlation(*(weights @ part for part in sums)).astype(np.float32))
    low, high = np.nanquantile(np.concatenate(draws), [0.025, 0.975], axis=0)
    women, men = (np.asarray(z[side].mean(axis=0)).ravel() for side in (woman, ~woman))
    share = (women - men) * contribution / gap if gap else np.zeros(len(contribution))
    return Association(value, low.astype(np.float64), high.astype(np.float64), share)


def _cluster_sums(
    z: Activations, woman: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]
) -> tuple[NDArray[np.float64], ...]:
    """Return sums by cluster of 1, y, z, z^2 and z y, with y 1 for a woman; the first two have one column."""
    import scipy.sparse as sp

    _, codes = np.unique(cluster, return_inverse=True)
    n = len(codes)
    member = sp.csr_array((np.ones(n), (codes, np.arange(n))), shape=(int(codes.max()) + 1, n))
    y = woman.astype(np.float64)[:, None]

    def sums(x: Any) -> NDArray[np.float64]:
        total = member @ x
        return np.asarray(total.toarray() if sp.issparse(total) else total, dtype=np.float64)

    of_women = sp.diags_array(y[:, 0]) @ z
    return sums(np.ones((n, 1))), sums(y), sums(z), sums(z * z), sums(of_women)


def _correlation(
    count: NDArray[np.float64],
    women: NDArray[np.float64],
    z: NDArray[np.float64],
    squares: NDArray[np.float64],
    products: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Pearson correlation from weighted sums, each (R, 1) or (R, n); 0 where a side is constant."""
    covariance = products / count - z / count * (women / count)
    spread = squares / count - (z / count) ** 2
    balance = women / count * (1 - women / count)
    # A feature that fires in none of the resampled clusters leaves rounding, not variance.
    floor = 1e-9 * np.maximum(squares / count, np.finfo(np.float64).tiny)
    defined = (spread > floor) & (balance > 0)
    scale = np.sqrt(np.where(defined, spread * balance, 1.0))
    result: NDArray[np.float64] = np.where(defined, covariance / scale, 0.0)
    return result
