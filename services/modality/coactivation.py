"""Do both sides of a pair fire together? Correlation on true pairs against shuffled ones.

An MDS of 0.5 says that a feature has as much energy on images as on texts, not that it fires on both sides of
the same pair. Co-activation is the correlation C_j = corr(zI_j, zT_j) over true pairs; the null is what it
becomes when texts are dealt to images at random.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.sparse as sp
from numpy.typing import NDArray

from services.check import Check, nothing
from services.modality.scores import Activations, Floats, group_sums

# Features worked on at once: bounds memory to a few times block x pairs doubles.
FEATURE_BLOCK = 64

# Correlations this close count as equal: rounding of a transform of unit vectors is below 1e-13.
TIE = 1e-10


def standardise(z: Floats) -> Floats:
    """Return the columns of `z` centred and of unit length; zero where constant."""
    centred: Floats = z - z.mean(axis=0)
    norm = np.sqrt((centred**2).sum(axis=0))
    # Centring a constant column leaves rounding noise, which must not be scaled up to a signal.
    constant = norm <= 1e-12 * np.sqrt((z**2).sum(axis=0))
    unit: Floats = np.divide(centred, norm, out=np.zeros_like(centred), where=~constant & (norm > 0))
    return unit


def shifted_correlations(image: Floats, text: Floats) -> Floats:
    """Return C[s, j] = sum_i image[i, j] text[(i + s) mod N, j] for every shift s, by a Fourier transform."""
    spectrum = np.conj(scipy.fft.rfft(image, axis=0)) * scipy.fft.rfft(text, axis=0)
    return np.asarray(scipy.fft.irfft(spectrum, n=len(image), axis=0))


def permutation_p_values(
    image: Floats, text: Floats, shuffles: int, rng: np.random.Generator, check: Check = nothing
) -> tuple[Floats, Floats]:
    """Return correlations and their one-sided permutation p-values, p_j = (1 + #{C* >= C}) / (1 + #shuffles).

    With more than `shuffles` pairs, the shuffles are all cyclic shifts of the pairs put in random order.
    Shifts form a group, so under the null (texts exchangeable) the test is exact, as with any group of
    permutations (Hemerik and Goeman, "Exact testing with random permutations", 2018); one transform gives all
    of them, and p can be as small as 1/N. With fewer pairs the shuffles are drawn freely.

    Parameters
    ----------
    image, text : float64 arrays, shape (N, n)
        Standardised columns (see `standardise`).
    shuffles : int
        Number of shuffles, at least.
    rng : Generator
        Of the shuffles.
    check : callable
        Called between steps.

    Returns
    -------
    correlation, p : float64 arrays, shape (n,)
    """
    n_pairs = len(image)
    if n_pairs > shuffles:
        order = rng.permutation(n_pairs)
        correlations = shifted_correlations(image[order], text[order])
        observed = correlations[0]
        return observed, (correlations >= observed - TIE).mean(axis=0)
    observed = np.einsum("ij,ij->j", image, text)
    at_least = np.ones_like(observed)
    for _ in range(shuffles):
        check()
        at_least += np.einsum("ij,ij->j", image, text[rng.permutation(n_pairs)]) >= observed - TIE
    return observed, at_least / (shuffles + 1)


def coactivation(
    z_image: Activations,
    z_text: Activations,
    *,
    shuffles: int = 1000,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
    check: Check = nothing,
) -> tuple[Floats, Floats]:
    """Return C_j = corr(zI_j, zT_j) on true pairs and its p-value against shuffles.

    Parameters
    ----------
    z_image, z_text : activations, shape (N, n)
        Of true pairs.
    shuffles : int
        Number of shuffles, at least.
    seed : int
        Of the shuffles.
    groups : int array, shape (N,), or None
        Pairs that are not independent share a number; the correlation is then over the groups' mean
        activations, because shuffling dependent pairs one by one would make chance look too rare.
    check : callable
        Called between steps.

    Returns
    -------
    correlation, p : float64 arrays, shape (n,)
        NaN where a side never varies.
    """
    if groups is not None:
        sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
        z_image, z_text = (scale_rows(group_sums(z, groups), 1 / sizes) for z in (z_image, z_text))
    n_features = z_image.shape[1]
    correlation, p = np.full(n_features, np.nan), np.full(n_features, np.nan)
    sides = [z.tocsc() if sp.issparse(z) else z for z in (z_image, z_text)]
    live = np.flatnonzero(np.logical_and(*(_fires(z) for z in sides)))
    rng = np.random.default_rng(seed)
    for start in range(0, len(live), FEATURE_BLOCK):
        check()
        block = live[start : start + FEATURE_BLOCK]
        image, text = (standardise(_dense(z[:, block])) for z in sides)
        observed, p_block = permutation_p_values(image, text, shuffles, rng, check)
        varies = image.any(axis=0) & text.any(axis=0)
        correlation[block] = np.where(varies, observed, np.nan)
        p[block] = np.where(varies, p_block, np.nan)
    return correlation, p


def benjamini_hochberg(p: Floats) -> Floats:
    """Return q-values, q_(r) = min over r' >= r of m p_(r') / r', for the m p-values that are not NaN.

    Calling a feature significant where q <= alpha keeps the false discovery rate at alpha (Benjamini and
    Hochberg, 1995).
    """
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    ranks = np.arange(1, len(order) + 1)
    scaled = p[order] * len(order) / ranks
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def scale_rows(x: Activations, factors: Floats) -> Activations:
    """Multiply each row by its factor."""
    return sp.csr_array(sp.diags_array(factors) @ x) if sp.issparse(x) else x * factors[:, None]


def _fires(z: Activations) -> NDArray[np.bool_]:
    return np.asarray(abs(z).sum(axis=0)).ravel() > 0


def _dense(z: Activations) -> Floats:
    return np.asarray(z.toarray() if sp.issparse(z) else z, dtype=np.float64)
