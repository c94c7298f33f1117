"""How well towers match images and captions: retrieval, zero-shot gender, bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from services.intervals import area_under_roc, mean_interval

Embeddings = Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval."""

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


def recall(rank: np.ndarray, k: int) -> Bool[np.ndarray, " n"]:
    """Return for each query whether a right answer is among the first `k`."""
    return np.asarray(rank < k)


def bootstrap_mean(
    values: np.ndarray, resamples: int = 1000, seed: int = 0, groups: np.ndarray | None = None
) -> Interval:
    """Return the mean with its interval, by group; of booleans it is a share. See `services.intervals`."""
    return Interval(*mean_interval(values, groups, resamples, seed))


def auc_interval(score: np.ndarray, positive: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """Return the area under the ROC curve with its interval, by group."""
    area = area_under_roc(score, positive, groups)
    return Interval(area.value, area.low, area.high)


def summarise(
    rank: np.ndarray, ks: tuple[int, ...] = (1, 5), groups: np.ndarray | None = None
) -> dict[int, Interval]:
    """Return R@k with its interval for each `k`; queries that are not independent share a group."""
    return {k: bootstrap_mean(recall(rank, k), groups=groups) for k in ks}


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
    groups: np.ndarray | None = None,
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
    groups : np.ndarray or None
        Concept of each image [n], by which intervals are made; None is each image by itself. A caption's concept is
        that of the first image with it.
    """
    forward = ranks(images, texts, captions, text_captions)
    drawn = np.isin(text_captions, captions)
    backward = ranks(texts[drawn], images, text_captions[drawn], captions)
    by_caption = None
    if groups is not None:
        known, first = np.unique(captions, return_index=True)
        by_caption = groups[first[np.searchsorted(known, text_captions[drawn])]]
    return Retrieval(
        summarise(forward, groups=groups),
        summarise(backward, groups=by_caption),
        candidates=len(text_captions),
        queries=len(images),
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
