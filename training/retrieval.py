"""How well towers match images and captions: retrieval, zero-shot gender, bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

Embeddings = Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ranks(
    queries: Embeddings, answers: Embeddings, query_labels: np.ndarray, answer_labels: np.ndarray
) -> np.ndarray:
    """Return the rank (0 is best) of the first right answer to each query by cosine similarity.

    Ties count against the query.

    Parameters
    ----------
    queries, answers : np.ndarray
        Unit rows, float32 [n_queries, d] and [n_answers, d].
    query_labels, answer_labels : np.ndarray
        An answer is right when its label equals the query's.

    Returns
    -------
    np.ndarray
        int64 [n_queries].
    """
    similarity = queries @ answers.T
    right = query_labels[:, None] == answer_labels[None, :]
    best_right = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    return ((similarity >= best_right) & ~right).sum(1)


def recall(rank: np.ndarray, k: int) -> np.ndarray:
    """Return for each query whether a right answer is among the first `k`, float64 [n]."""
    return (rank < k).astype(np.float64)


def bootstrap_mean(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> Interval:
    """Return the mean with its percentile bootstrap interval over rows."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples) / len(
        values
    )
    low, high = np.percentile(weights @ values, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_auc(score: np.ndarray, positive: np.ndarray, resamples: int = 1000, seed: int = 0) -> Interval:
    """Return the area under the ROC curve with its percentile bootstrap interval over rows."""
    rng = np.random.default_rng(seed)
    draws = []
    while len(draws) < resamples:
        index = rng.integers(0, len(score), len(score))
        if 0 < positive[index].sum() < len(index):
            draws.append(roc_auc_score(positive[index], score[index]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(roc_auc_score(positive, score)), float(low), float(high))


def summarise(rank: np.ndarray, ks: tuple[int, ...] = (1, 5)) -> dict[int, Interval]:
    """Return R@k with its interval for each `k`."""
    return {k: bootstrap_mean(recall(rank, k)) for k in ks}


@dataclass(frozen=True)
class Retrieval:
    """Recall in both directions."""

    image_to_text: dict[int, Interval]
    text_to_image: dict[int, Interval]
    candidates: int
    queries: int


def retrieval(
    images: Embeddings,
    captions: np.ndarray,
    texts: Embeddings,
    text_captions: np.ndarray,
) -> Retrieval:
    """Return R@k from image to caption and from caption to image.

    Parameters
    ----------
    images : np.ndarray
        Unit image embeddings, float32 [n, d].
    captions : np.ndarray
        Caption of each image, str [n].
    texts : np.ndarray
        Unit text embeddings, one a distinct caption, float32 [m, d].
    text_captions : np.ndarray
        The distinct captions, str [m].
    """
    forward = ranks(images, texts, captions, text_captions)
    drawn = np.isin(text_captions, captions)
    backward = ranks(texts[drawn], images, text_captions[drawn], captions)
    return Retrieval(
        summarise(forward), summarise(backward), candidates=len(text_captions), queries=len(images)
    )


def participation_ratio(embeddings: Embeddings) -> float:
    """Return how many directions the variance of embeddings fills: (sum of eigenvalues)^2 / sum of their squares.

    Between 1, all on a line, and the smaller of n and d, the same in all directions.
    """
    variances = np.linalg.svd(embeddings - embeddings.mean(0), compute_uv=False) ** 2
    return float(variances.sum() ** 2 / (variances**2).sum())


def gender_score(
    images: Embeddings, man: Float[np.ndarray, " d"], woman: Float[np.ndarray, " d"]
) -> np.ndarray:
    """Return s = <e, t_woman - t_man> for each image, float32 [n]."""
    return images @ (woman - man)
