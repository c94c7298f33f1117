"""Names for features: the caption words that go with them, judged on held-out samples.

    npmi(w, j) = ln( p(w, j) / (p(w) p(j)) ) / -ln p(w, j)

over samples, w being "the caption has the word" and j "the feature fires": 1 if they always go together, 0 if
they are independent, -1 if they never meet. Source: Bouma, "Normalized (pointwise) mutual information in
collocation extraction" (2009).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.stats import rankdata

from services.modality.scores import Activations, Floats

# Features are scored so many at once that words x features and samples x features are at most this: 32 MB an array of
# doubles, and `npmi` makes a few of them.
CELLS = 4_000_000

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")

# Words that hold a caption together and would name nothing.
STOP_WORDS = frozenset(
    ["a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "in", "into", "is", "it", "its"]
    + ["of", "on", "or", "that", "the", "their", "this", "to", "with"]
)


def caption_words(caption: str) -> set[str]:
    """Return the words of a caption that could name something, in lower case."""
    return {word for word in WORD.findall(caption.lower()) if len(word) > 1 and word not in STOP_WORDS}


@dataclass(frozen=True)
class Words:
    """Which captions have which words.

    Attributes
    ----------
    vocabulary : tuple of str
        Sorted.
    present : csr_array of float32, shape (N, V)
        1 where the caption has the word.
    """

    vocabulary: tuple[str, ...]
    present: sp.csr_array

    @classmethod
    def of(cls, captions: Sequence[str], min_count: int = 5) -> Words:
        """Collect the words that at least `min_count` captions have; rarer ones fit any feature by chance."""
        sets = [caption_words(caption) for caption in captions]
        counts = Counter(word for words in sets for word in words)
        return cls.with_vocabulary(sets, [word for word, count in counts.items() if count >= min_count])

    @classmethod
    def with_vocabulary(cls, sets: Sequence[set[str]], vocabulary: Sequence[str]) -> Words:
        """Mark the words of `vocabulary` in each set of words."""
        ordered = tuple(sorted(vocabulary))
        column = {word: i for i, word in enumerate(ordered)}
        cells = [(i, column[word]) for i, words in enumerate(sets) for word in words if word in column]
        rows, columns = (np.array([cell[axis] for cell in cells], np.int64) for axis in (0, 1))
        ones = np.ones(len(cells), np.float32)
        return cls(ordered, sp.csr_array((ones, (rows, columns)), shape=(len(sets), len(ordered))))


def npmi(present: sp.csr_array, fires: Activations) -> Floats:
    """Return npmi(w, j), shape (V, n).

    Parameters
    ----------
    present : csr_array, shape (N, V)
        1 where sample i's caption has word w.
    fires : array or sparse array, shape (N, n)
        Positive where feature j fires on sample i.

    Returns
    -------
    float64 array, shape (V, n)
        In [-1, 1]; -1 where they never meet, NaN where the word or the feature never occurs.
    """
    n = present.shape[0]
    firing = sp.csr_array(fires > 0, dtype=np.float32)
    joint = np.asarray((present.T @ firing).toarray(), np.float64) / n
    word = np.asarray(present.sum(axis=0), np.float64).ravel()[:, None] / n
    feature = np.asarray(firing.sum(axis=0), np.float64).ravel()[None] / n
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.log(joint / (word * feature)) / -np.log(joint)
    # Always together and always there: the limit of the quotient 0/0 is 1.
    score = np.where(joint == 1, 1.0, np.where(joint == 0, -1.0, score))
    return np.where((word > 0) & (feature > 0), score, np.nan)


def auc(score: Floats, positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve: P(score of a positive > score of a negative), ties counting half.

    By ranks (Mann-Whitney): AUC = (R+ - P (P + 1) / 2) / (P Q) for P positives of rank sum R+ and Q
    negatives. NaN where either is missing.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def best_words(present: sp.csr_array, fires: Activations, count: int) -> tuple[NDArray[np.int64], Floats]:
    """Return the words with the highest npmi of each feature, best first, and their npmi, shapes (count, n).

    Features are taken in blocks: all words with all features would be gigabytes where there are many of both.

    Parameters
    ----------
    present, fires
        As for `npmi`; slices of columns are taken of `fires`.
    count : int
        At most V.
    """
    width = max(1, CELLS // max(present.shape))
    words, scores = [], []
    for first in range(0, fires.shape[1], width):
        block = np.nan_to_num(npmi(present, fires[:, first : first + width]), nan=-1.0)
        words.append(np.argsort(-block, axis=0, kind="stable")[:count])
        scores.append(np.take_along_axis(block, words[-1], axis=0))
    return np.concatenate(words, axis=1), np.concatenate(scores, axis=1)


@dataclass(frozen=True)
class Names:
    """Names of all features.

    Attributes
    ----------
    name : str array, shape (n,)
        One or more words, best first, joined by a comma; empty where no word goes with the feature.
    npmi : float64 array, shape (n,)
        Of the first word, on the naming samples.
    auc : float64 array, shape (n,)
        Of the activation as a detector of captions with any word of the name, on held-out samples.
    """

    name: NDArray[np.str_]
    npmi: Floats
    auc: Floats


def name_features(
    z: Activations,
    captions: Sequence[str],
    z_held_out: Activations,
    captions_held_out: Sequence[str],
    *,
    words: int = 2,
    min_count: int = 5,
    min_npmi: float = 0.1,
) -> Names:
    """Name features by the caption words with the highest normalised PMI.

    Parameters
    ----------
    z : activations, shape (N, n)
        Of the naming samples, images or texts.
    captions : sequence of str, length N
        Theirs.
    z_held_out, captions_held_out
        Samples the names are judged on.
    words : int
        Words a name may have.
    min_count : int
        Captions a word must be in to be considered.
    min_npmi : float
        Below it a word does not go with the feature.
    """
    found = Words.of(captions, min_count)
    n_features = z.shape[1]
    names = np.full(n_features, "", dtype=object)
    best, areas = np.full(n_features, np.nan), np.full(n_features, np.nan)
    if not found.vocabulary:
        return Names(names.astype(np.str_), best, areas)
    order, scores = best_words(found.present, _by_column(z), words)
    held_out = Words.with_vocabulary([caption_words(text) for text in captions_held_out], found.vocabulary)
    present = held_out.present.tocsc()
    columns = _by_column(z_held_out)
    for j in range(n_features):
        chosen = order[scores[:, j] >= min_npmi, j]
        if not len(chosen):
            continue
        names[j] = ", ".join(found.vocabulary[w] for w in chosen)
        best[j] = scores[0, j]
        column = columns[:, [j]]
        activation = np.asarray(column.toarray() if sp.issparse(column) else column, np.float64).ravel()
        areas[j] = auc(activation, np.asarray(present[:, chosen].sum(axis=1)).ravel() > 0)
    return Names(names.astype(np.str_), best, areas)


def _by_column(z: Activations) -> Activations:
    """Return activations in a form that gives columns fast."""
    return z.tocsc() if sp.issparse(z) else z
