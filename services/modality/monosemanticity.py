"""Is a feature about one thing? EmbSim and WinRate, judged by an encoder other than the one under test.

Both compare the m samples on which a feature fires most with random samples, by the cosine of a judge's
embeddings:

    EmbSim_j  = mean over pairs i != k of the top m of <u_i, u_k>
    WinRate_j = mean over pairs i != k of the top m of P(<u_i, u_k> > <u_a, u_b>),  a, b random samples

The source draws one set of m random samples a feature; here the comparison is with the whole population
instead (the mean cosine of all pairs, `population_similarity`, and the distribution of many random pairs),
which has the same expectation and no noise of its own. A feature that fires on fewer than m samples has no
score at m. Of samples that show the same thing (drawings of one concept) only the strongest counts: else a feature that
fires on m drawings of one thing scores like one that fires on m things that are alike.

What the scores are worth shows beside a feature that is no feature: an embedding of a sample, as a direction
(`embedding_features`), whose strongest samples are that sample's nearest neighbours.

Source: "Multi-Faceted Multimodal Monosemanticity" (arXiv 2502.14888), section on monosemanticity measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from services.modality.scores import Activations, Floats

# Random pairs that stand for the population: the standard error of a win rate is below 0.5 / sqrt(200,000) =
# 0.001.
RANDOM_PAIRS = 200_000


def top_samples(
    z: Activations, m: int, groups: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the m samples with the largest activation of each feature, at most one a group.

    Parameters
    ----------
    z : activations, shape (N, n)
        Of samples of one modality.
    m : int
        Samples a feature.
    groups : int array, shape (N,), or None
        Samples that show the same thing share a number; None is each by itself.

    Returns
    -------
    samples : int64 array, shape (n, m)
        Row numbers, strongest first; ties by row number.
    enough : bool array, shape (n,)
        Whether the feature has m positive activations; where not, the row of `samples` is meaningless.
    """
    columns = z.tocsc() if sp.issparse(z) else z
    n_features = z.shape[1]
    samples = np.zeros((n_features, m), np.int64)
    enough = np.zeros(n_features, bool)
    for j in range(n_features):
        if sp.issparse(columns):
            span = slice(columns.indptr[j], columns.indptr[j + 1])
            rows, values = columns.indices[span], columns.data[span]
        else:
            rows, values = np.arange(len(columns)), columns[:, j]
        firing = values > 0
        rows, values = rows[firing], values[firing]
        rows = rows[np.lexsort((rows, -values))]
        if groups is not None:
            rows = rows[np.sort(np.unique(groups[rows], return_index=True)[1])]
        if len(rows) >= m:
            samples[j] = rows[:m]
            enough[j] = True
    return samples, enough


def embedding_features(
    e: NDArray[np.float32], others: NDArray[np.float32], features: int, seed: int = 0
) -> NDArray[np.float32]:
    """Return the activations of features that are embeddings of samples: the baseline of EmbSim and WinRate.

    Parameters
    ----------
    e : float32 array, shape (N, d)
        Embeddings of the judged samples.
    others : float32 array, shape (M, d)
        Embeddings that dictionaries were trained on, of the same modality; the features are drawn of these.
    features : int
        How many, at most M.
    seed : int
        Of the draw.

    Returns
    -------
    float32 array, shape (N, features)
        (e - mean) . (r - mean) for each drawn r; where that is not positive the feature does not fire.
    """
    mean = others.mean(0)
    drawn = others[np.random.default_rng(seed).permutation(len(others))[:features]]
    return np.asarray((e - mean) @ (drawn - mean).T, np.float32)


def mean_pairwise_cosine(u: Floats) -> Floats:
    """Return the mean of <u_i, u_k> over i != k, for unit vectors of shape (..., m, d), shape (...).

    sum_{i != k} <u_i, u_k> = ||sum_i u_i||^2 - m, so no m x m matrix is needed.
    """
    m = u.shape[-2]
    mean: Floats = ((u.sum(axis=-2) ** 2).sum(axis=-1) - m) / (m * (m - 1))
    return mean


def population_similarity(judge: NDArray[np.float32]) -> float:
    """Return the mean cosine of two different random samples: what EmbSim is without monosemanticity."""
    return float(mean_pairwise_cosine(judge.astype(np.float64)))


def emb_sim(samples: NDArray[np.int64], enough: NDArray[np.bool_], judge: NDArray[np.float32]) -> Floats:
    """Return EmbSim of each feature, shape (n,), NaN where it fires on too few samples.

    Parameters
    ----------
    samples, enough
        From `top_samples`.
    judge : float32 array, shape (N, d)
        Unit embeddings of the samples by the judge.
    """
    scores = np.full(len(samples), np.nan)
    for j in np.flatnonzero(enough):
        scores[j] = mean_pairwise_cosine(judge[samples[j]].astype(np.float64))
    return scores


def random_cosines(judge: NDArray[np.float32], pairs: int, seed: int) -> Floats:
    """Return the cosines of random pairs of different samples, sorted ascending, shape (pairs,)."""
    rng = np.random.default_rng(seed)
    n = len(judge)
    first = rng.integers(0, n, pairs)
    second = (first + rng.integers(1, n, pairs)) % n
    return np.sort(np.einsum("pd,pd->p", judge[first], judge[second]).astype(np.float64))


def win_rate(
    samples: NDArray[np.int64],
    enough: NDArray[np.bool_],
    judge: NDArray[np.float32],
    *,
    pairs: int = RANDOM_PAIRS,
    seed: int = 0,
) -> Floats:
    """Return WinRate of each feature, shape (n,), NaN where it fires on too few samples.

    Parameters
    ----------
    samples, enough
        From `top_samples`.
    judge : float32 array, shape (N, d)
        Unit embeddings of the samples by the judge.
    pairs : int
        Random pairs that stand for the population.
    seed : int
        Of the random pairs.
    """
    population = random_cosines(judge, pairs, seed)
    upper = np.triu_indices(samples.shape[1], k=1)
    rates = np.full(len(samples), np.nan)
    for j in np.flatnonzero(enough):
        top = judge[samples[j]].astype(np.float64)
        cosines = (top @ top.T)[upper]
        rates[j] = np.searchsorted(population, cosines, side="left").mean() / pairs
    return rates


@dataclass(frozen=True)
class Mean:
    """A mean over features with its bootstrap interval, and how many features it is over."""

    mean: float
    low: float
    high: float
    features: int


def mean_over_features(scores: Floats, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Mean:
    """Return the mean of the scores that are defined, with a bootstrap interval over features."""
    defined = scores[~np.isnan(scores)]
    if len(defined) == 0:
        return Mean(np.nan, np.nan, np.nan, 0)
    rng = np.random.default_rng(seed)
    means = [rng.choice(defined, len(defined)).mean() for _ in range(resamples)]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Mean(float(defined.mean()), float(low), float(high), len(defined))
