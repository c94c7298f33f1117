"""The Modality Dominance Score, in the paper's form and as a share of energy, with a bootstrap interval.

Notation: zI and zT are the activations of N image-text pairs, shape (N, n); row i of both is one pair. They
may be dense or, as TopK makes them, sparse.

Source: "Multi-Faceted Multimodal Monosemanticity" (arXiv 2502.14888), section 3, for the paper's form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.stats import norm, t

from services.check import Check, nothing
from services.sparse_row import SparseRow

# A float32 array or a scipy.sparse.csr_array, shape (samples, n): they share the operators used here, but no
# type.
Activations: TypeAlias = Any
Floats = NDArray[np.float64]

# Above this share of non-zeros a dense product is faster than a sparse one.
SPARSE_BELOW = 0.1

# Resamples drawn at once: bounds the memory of their weights (block x pairs).
RESAMPLE_BLOCK = 50

# Replicates held at once (resamples x features): 128 MB, and as much again while their quantiles are taken.
REPLICATES = 32_000_000


def stack_rows(rows: Sequence[SparseRow], n_features: int) -> sp.csr_array:
    """Return the activations of many inputs as one sparse matrix, shape (len(rows), n_features)."""
    starts = np.concatenate([[0], np.cumsum([len(row.indices) for row in rows], dtype=np.int64)])
    indices = np.concatenate([np.empty(0, np.int32), *(row.indices for row in rows)])
    values = np.concatenate([np.empty(0, np.float32), *(row.values for row in rows)])
    return sp.csr_array((values, indices, starts), shape=(len(rows), n_features))


def compact(z: Activations) -> Activations:
    """Return the activations in the form that is faster to work with, dense or sparse."""
    if sp.issparse(z):
        csr = z.tocsr()
        return csr if csr.nnz < SPARSE_BELOW * csr.shape[0] * csr.shape[1] else csr.toarray()
    dense = np.asarray(z, dtype=np.float32)
    return sp.csr_array(dense) if np.count_nonzero(dense) < SPARSE_BELOW * dense.size else dense


def column_sums(x: Activations) -> Floats:
    """Return the sum over rows, in float64."""
    return np.asarray(x.sum(axis=0, dtype=np.float64)).ravel()


def firing_rates(z: Activations) -> Floats:
    """Return the share of samples in which each feature is not zero."""
    rates: Floats = nonzero_rows(z) / z.shape[0]
    return rates


def nonzero_rows(x: Activations) -> NDArray[np.int64]:
    """Return in how many rows each column is not zero."""
    counts = x.tocsc().count_nonzero(axis=0) if sp.issparse(x) else np.count_nonzero(x, axis=0)
    return np.asarray(counts, dtype=np.int64)


def energies(z: Activations) -> Floats:
    """Return E_j = mean_i a_ij^2 with a = z / sqrt(mean over samples and features of z^2).

    The mean over features is 1, so that a modality whose activations are larger throughout does not dominate.
    Zeros where nothing fires at all.
    """
    sums = column_sums(z * z)
    mean = float(sums.mean())
    return np.divide(sums, mean) if mean > 0 else sums


def energy_mds(energy_image: Floats, energy_text: Floats) -> Floats:
    """Return MDS_j = E_I,j / (E_I,j + E_T,j): 1 is all image, 0 is all text, NaN where neither fires."""
    total = energy_image + energy_text
    mds: Floats = np.divide(energy_image, total, out=np.full(total.shape, np.nan), where=total > 0)
    return mds


def paper_mds(z_image: Activations, z_text: Activations) -> tuple[Floats, NDArray[np.int64]]:
    """Return the paper's MDS_j = mean_i |zI_ij| / (|zI_ij| + |zT_ij|).

    The mean is over the pairs in which at least one side fires: under TopK most pairs are 0/0.

    Returns
    -------
    mds : float64 array, shape (n,)
        NaN where a feature never fires.
    pairs : int64 array, shape (n,)
        How many pairs each mean is over.
    """
    image, text = abs(z_image), abs(z_text)
    if sp.issparse(image) or sp.issparse(text):
        image, text = sp.csr_array(image), sp.csr_array(text)
        total = image + text
        total.eliminate_zeros()
        pairs = np.asarray(total.tocsc().count_nonzero(axis=0))
        inverse = sp.csr_array(
            (1.0 / total.data.astype(np.float64), total.indices, total.indptr), total.shape
        )
        shares = column_sums(image.multiply(inverse))
    else:
        total = image + text
        pairs = np.count_nonzero(total, axis=0)
        shares = np.divide(image, total, out=np.zeros_like(total), where=total > 0).sum(0, dtype=np.float64)
    mds = np.divide(shares, pairs, out=np.full(shares.shape, np.nan), where=pairs > 0)
    return mds, pairs.astype(np.int64)


def resampling_weights(n: int, resamples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return how often each of n units is drawn when n are drawn with replacement, shape (resamples, n)."""
    draws = (np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples))
    return np.stack(list(draws)).astype(np.float32)


def resampling_blocks(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Yield the weights of all resamples, at most RESAMPLE_BLOCK rows at a time; the same for one seed."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLE_BLOCK):
        yield resampling_weights(n, min(RESAMPLE_BLOCK, resamples - start), rng)


def group_sums(x: Activations, groups: NDArray[np.int64] | None) -> Activations:
    """Return the sum of the rows of each group, or `x` itself without groups."""
    if groups is None:
        return x
    _, codes = np.unique(groups, return_inverse=True)
    members = sp.csr_array((np.ones(len(codes), np.float32), (codes, np.arange(len(codes)))))
    sums: Activations = members @ x
    return sums


def active_units(
    z_image: Activations, z_text: Activations, groups: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return in how many pairs, or groups of pairs, each feature has energy on either side, shape (n,)."""
    image, text = (group_sums(z * z, groups) for z in (z_image, z_text))
    return nonzero_rows(image + text)


def bootstrap_mds(
    z_image: Activations,
    z_text: Activations,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
    check: Check = nothing,
) -> tuple[Floats, Floats]:
    """Return the bootstrap interval of the energy MDS over pairs.

    A resample gives pair i the weight w_i, and energies are linear in weights: E_j = sum_i w_i z_ij^2 /
    mean_j(same). So all resamples are one matrix product. Features are taken in blocks, each on the same resamples,
    where all replicates at once would be more than REPLICATES; the means over features are then taken beforehand.

    A resample in which a feature does not fire says nothing of it and counts as 0.5. Two things make the interval
    cover what it says where few units fire, which the plain percentiles do not (77 to 90% at 4 to 12 units): the
    percentiles are those of `expanded_tails`, and where one side has no energy at all, so that every resample is 0
    or 1, the other bound is Clopper and Pearson's, (alpha / 2)^(1 / units) from the side that has it.

    Parameters
    ----------
    z_image, z_text : activations, shape (N, n)
        Of true pairs.
    resamples : int
        Number of bootstrap resamples.
    level : float
        Coverage of the interval.
    seed : int
        Of the resampling.
    groups : int array, shape (N,), or None
        Pairs that are not independent (several drawings of one concept) share a number, and are resampled
        together.
    check : callable
        Called between steps.

    Returns
    -------
    low, high : float64 arrays, shape (n,)
        NaN where a feature never fires.
    """
    squares = [group_sums(z * z, groups) for z in (z_image, z_text)]
    transposed = [x.T.tocsr() if sp.issparse(x) else np.ascontiguousarray(x.T) for x in squares]
    n_units, n_features = squares[0].shape
    width = max(1, REPLICATES // resamples)
    means = None
    if width < n_features:
        means = [
            _means(transposed, weights, check) for weights in resampling_blocks(n_units, resamples, seed)
        ]
    units = nonzero_rows(squares[0] + squares[1])
    tails = expanded_tails(units, level)
    bounds = []
    for first in range(0, n_features, width):
        block = [x[first : first + width] for x in transposed]
        replicates = np.empty((resamples, block[0].shape[0]), np.float32)
        for i, weights in enumerate(resampling_blocks(n_units, resamples, seed)):
            check()
            energy = [(x @ weights.T).T.astype(np.float64) for x in block]
            mean = [None, None] if means is None else means[i]
            mds = energy_mds(*map(normalised, energy, mean))
            start = i * RESAMPLE_BLOCK
            replicates[start : start + len(weights)] = np.where(np.isnan(mds), 0.5, mds)
        replicates.sort(axis=0)
        tail = tails[first : first + width]
        bounds.append([sorted_quantiles(replicates, tail), sorted_quantiles(replicates, 1 - tail)])
    low, high = np.concatenate(bounds, axis=1)
    image, text = (column_sums(x) for x in squares)
    end = ((1 - level) / 2) ** (1 / np.maximum(units, 1))
    low = np.where(text > 0, low, np.minimum(low, end))
    high = np.where(image > 0, high, np.maximum(high, 1 - end))
    alive = units > 0
    return np.where(alive, low, np.nan), np.where(alive, high, np.nan)


def expanded_tails(units: NDArray[np.int64], level: float = 0.95) -> Floats:
    """Return the share of bootstrap replicates beyond each end of an interval that rests on `units` units.

    Phi(sqrt(u / (u - 1)) t), t being Student's quantile with u - 1 degrees of freedom: a bootstrap's spread is too
    small by sqrt((u - 1) / u), and its percentiles are those of a normal where a t is due. 0 for a single unit: the
    interval is then all that the replicates span.

    Source: Hesterberg, "What teachers should know about the bootstrap" (2015), the expanded percentile interval.
    """
    freedom = np.maximum(units - 1, 1)
    expanded: Floats = norm.cdf(np.sqrt(units / freedom) * t.ppf((1 - level) / 2, freedom))
    return np.where(units > 1, expanded, 0.0)


def sorted_quantiles(rows: NDArray[np.float32], shares: Floats) -> Floats:
    """Return of each column of rows sorted along axis 0, shape (R, n), the quantile at its share, shape (n,)."""
    position = shares * (len(rows) - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, len(rows) - 1)
    columns = np.arange(rows.shape[1])
    first, second = rows[below, columns].astype(np.float64), rows[above, columns].astype(np.float64)
    quantiles: Floats = first + (position - below) * (second - first)
    return quantiles


def _means(squares: Sequence[Activations], weights: NDArray[np.float32], check: Check) -> list[Floats]:
    """Return the mean over all features, shape (resamples, 1), of each side's energies."""
    check()
    return [(x @ weights.T).T.astype(np.float64).mean(axis=1, keepdims=True) for x in squares]


def normalised(energy: Floats, mean: Floats | None = None) -> Floats:
    """Divide each row of energies, shape (resamples, n), by its mean over features (zero rows stay zero).

    `mean`, shape (resamples, 1), is for a block of features; by default it is taken of `energy`.
    """
    mean = energy.mean(axis=1, keepdims=True) if mean is None else mean
    relative: Floats = np.divide(energy, mean, out=np.zeros_like(energy), where=mean > 0)
    return relative
