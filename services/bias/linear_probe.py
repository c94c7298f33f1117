"""A linear classifier trained anew: whether gender is gone from embeddings, or only from one direction of them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from services.check import Check, nothing

FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-4, 3))


def probe_scores(
    e: Float[np.ndarray, "n d"],
    woman: Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"],
    seed: int = 0,
    check: Check = nothing,
) -> Float[np.ndarray, " n"]:
    """Return the margins of a ridge classifier on items of clusters that it was not fitted on, float64.

    Both genders weigh the same. The penalty is the one that classifies the held-out items best: an optimism in the
    probe's favour, so that an erasure is not called good for a badly tuned probe.

    Parameters
    ----------
    e : float array, shape (N, d)
        Embeddings.
    woman : bool array, shape (N,)
        What is to be told; above 0 is a woman.
    cluster : int array, shape (N,)
        Folds are made of whole clusters.
    seed : int
        Of the folds.
    check : callable
        Called before each fold.

    Returns
    -------
    float array, shape (N,)
        NaN where the other folds hold one gender only.
    """
    fold = cluster_folds(cluster, seed)
    margins = np.full((len(PENALTIES), len(e)), np.nan)
    for k in range(FOLDS):
        check()
        held, fitted = fold == k, fold != k
        if held.any() and 0 < woman[fitted].sum() < fitted.sum():
            margins[:, held] = _ridge_path(e[fitted], woman[fitted], e[held])
    with np.errstate(invalid="ignore"):
        right = (margins > 0) == woman
    accuracy = (right[:, woman].mean(1) + right[:, ~woman].mean(1)) / 2
    best: Float[np.ndarray, " n"] = margins[int(np.argmax(accuracy))]
    return best


def cluster_folds(cluster: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """Return the fold of each item, clusters dealt out at random."""
    names, codes = np.unique(cluster, return_inverse=True)
    deal = np.random.default_rng(seed).permutation(len(names)) % FOLDS
    folds: Int[np.ndarray, " n"] = deal[codes]
    return folds


def _ridge_path(
    x: Float[np.ndarray, "m d"], woman: Bool[np.ndarray, " m"], held: Float[np.ndarray, "h d"]
) -> Float[np.ndarray, "penalties h"]:
    """Margins on `held` for each penalty, relative to the mean variance: one eigendecomposition serves all."""
    weight = np.where(woman, 0.5 / woman.sum(), 0.5 / (~woman).sum())
    x64, target = x.astype(np.float64), np.where(woman, 1.0, -1.0)
    mean = weight @ x64
    centred = x64 - mean
    variances, axes = np.linalg.eigh(centred.T @ (weight[:, None] * centred))
    variances = np.maximum(variances, 0)
    covariance = axes.T @ (centred.T @ (weight * target))
    projected = (held.astype(np.float64) - mean) @ axes
    scale = max(float(variances.mean()), np.finfo(np.float64).tiny)
    return np.stack([projected @ (covariance / (variances + p * scale)) for p in PENALTIES])
