"""Names for features: the phrase of captions that a feature detects best, judged on held-out samples.

A name is a phrase that people wrote: a run of words of a caption, or a whole one. Of those that are phrases by
themselves and not the end of one joined to the start of the next (`Phrases`), those are considered whose average
precision beyond chance comes near the highest: the mean, over the samples whose caption has the phrase, of the share of
samples at least as strong that have it too. That is 1 where the strongest samples are those of the phrase and no
others; a word that most samples have and a phrase that few of the strong ones have are both low. Of these the feature
gets the phrase that it detects best, by the area under the ROC curve. How well it does is then said on samples that
chose nothing: the area, with its interval and the groups it rests on. A feature whose best phrase is under `MIN_AUC`
has no name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.stats import rankdata

from services.intervals import area_under_roc
from services.modality.scores import Activations, Floats

# A phrase that the activation detects less well on held-out samples names nothing.
MIN_AUC = 0.7
# Fewer held-out groups say too little about a phrase, whatever their AUC.
MIN_UNITS = 5
# Words a phrase may have.
MOST_WORDS = 6
# Phrases that are tried, the most frequent first; bounds memory on captions of many words.
MOST_PHRASES = 50_000
# Phrases are considered whose average precision is so large a share of the best one's.
NEAR = 0.4
# Of a feature's strongest samples: beyond these the ranking says nothing of what the feature is about.
STRONGEST = 2_000

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # noqa: RUF001 (people write that apostrophe)
# What ends a phrase.
BREAK = re.compile(r"[^\w\s'’-]+|\s-+\s|_+")  # noqa: RUF001

# Words that hold a caption together: a phrase neither starts nor ends with one.
STOP_WORDS = frozenset(
    ["a", "above", "an", "and", "are", "as", "at", "be", "behind", "below", "between", "by", "for", "from"]
    + ["has", "in", "into", "is", "it", "its", "of", "on", "or", "over", "that", "the", "their", "there"]
    + ["this", "to", "under", "with", "without"]
)
# A phrase whose neighbour is the same word in more of its places is a fragment of that longer phrase.
FRAGMENT = 0.9
# Two words or more are a phrase where, in so many of their places, it starts or ends where a part of the caption does.
AT_AN_EDGE = 0.5


def parts(caption: str) -> list[list[str]]:
    """Return the words of each part of a caption, in lower case; punctuation ends a part."""
    found = (WORD.findall(part) for part in BREAK.split(caption.lower()))
    return [words for words in found if words]


def caption_words(caption: str) -> set[str]:
    """Return the words of a caption that could name something, in lower case."""
    return {word for words in parts(caption) for word in words if _names(word)}


def _names(word: str) -> bool:
    return len(word) > 1 and word not in STOP_WORDS and not word.isdecimal()


def _runs(words: list[str]) -> Iterable[tuple[int, int]]:
    """Yield start and end of the runs of a part's words that could be phrases."""
    for start, first in enumerate(words):
        if first in STOP_WORDS:
            continue
        for end in range(start + 1, min(start + MOST_WORDS, len(words)) + 1):
            if words[end - 1] not in STOP_WORDS and (end > start + 1 or _names(first)):
                yield start, end


@dataclass(frozen=True)
class Phrases:
    """Which captions have which phrases.

    Attributes
    ----------
    vocabulary : tuple of str
        Sorted.
    present : csr_array of float32, shape (N, V)
        1 where the caption has the phrase.
    """

    vocabulary: tuple[str, ...]
    present: sp.csr_array

    @classmethod
    def of(cls, captions: Sequence[str], min_count: int = 5) -> Phrases:
        """Collect the phrases that at least `min_count` captions have; rarer ones fit any feature by chance.

        A run of words is no phrase where one word follows it, or goes before it, nearly everywhere ("dark skin", which
        only ever is the start of "dark skin tone"), nor where it mostly stands between other words ("worker medium").
        """
        places: Counter[str] = Counter()
        edges: Counter[str] = Counter()
        before: dict[str, Counter[str]] = {}
        after: dict[str, Counter[str]] = {}
        count: Counter[str] = Counter()
        for caption, times in Counter(captions).items():
            found = set()
            for words in parts(caption):
                for start, end in _runs(words):
                    phrase = " ".join(words[start:end])
                    left = words[start - 1] if start else ""
                    right = words[end] if end < len(words) else ""
                    found.add(phrase)
                    places[phrase] += times
                    edges[phrase] += times * any(not x or x in STOP_WORDS for x in (left, right))
                    for word, beside in ((left, before), (right, after)):
                        if word and word not in STOP_WORDS:
                            beside.setdefault(phrase, Counter())[word] += times
            count.update(dict.fromkeys(found, times))

        def whole(phrase: str) -> bool:
            most = FRAGMENT * places[phrase]
            if any(max(beside.get(phrase, {"": 0}).values()) > most for beside in (before, after)):
                return False
            return " " not in phrase or edges[phrase] >= AT_AN_EDGE * places[phrase]

        kept = [phrase for phrase, times in count.most_common() if times >= min_count and whole(phrase)]
        return cls.with_vocabulary(captions, kept[:MOST_PHRASES])

    @classmethod
    def with_vocabulary(cls, captions: Sequence[str], vocabulary: Sequence[str]) -> Phrases:
        """Mark the phrases of `vocabulary` in each caption."""
        ordered = tuple(sorted(vocabulary))
        column = {phrase: i for i, phrase in enumerate(ordered)}
        known: dict[str, NDArray[np.int64]] = {}
        for caption in set(captions):
            runs = (" ".join(words[a:b]) for words in parts(caption) for a, b in _runs(words))
            known[caption] = np.array(sorted({column[run] for run in runs if run in column}), np.int64)
        rows = [known[caption] for caption in captions]
        indices = np.concatenate([np.empty(0, np.int64), *rows])
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        ones = np.ones(len(indices), np.float32)
        return cls(ordered, sp.csr_array((ones, indices, starts), shape=(len(captions), len(ordered))))


def average_precision(present: sp.csr_array, activation: Floats) -> Floats:
    """Return the average precision of an activation as a detector of each phrase, beyond chance, shape (V,).

    AP_w = 1 / P_w sum over the samples of w of (samples of w among the r strongest) / r, r being the sample's rank and
    P_w the samples of w; returned is (AP_w - P_w / N) / (1 - P_w / N), P_w / N being the precision of any activation
    that knows nothing of w. 0 for a phrase that no sample has, or all. Samples on which the feature does not fire, and
    those beyond the `STRONGEST`, count as not found.

    Parameters
    ----------
    present : csr_array, shape (N, V)
        1 where sample i's caption has phrase w.
    activation : float array, shape (N,)
        Of one feature; ties in the order of the samples.
    """
    order = np.argsort(-activation, kind="stable")[:STRONGEST]
    order = order[activation[order] > 0]
    hits = sp.csr_array(present)[order].tocsc()
    hits.sort_indices()
    length = np.diff(hits.indptr)
    number = np.arange(hits.nnz) - np.repeat(hits.indptr[:-1], length) + 1
    column = np.repeat(np.arange(hits.shape[1]), length)
    found = np.bincount(column, number / (hits.indices + 1), minlength=hits.shape[1])
    total = np.asarray(present.sum(axis=0), np.float64).ravel()
    some = (total > 0) & (total < len(activation))
    precision: Floats = np.divide(found, total, out=np.zeros(len(total)), where=some)
    chance = np.where(some, total / len(activation), 0.0)
    beyond: Floats = (precision - chance) / (1 - chance)
    return beyond


def areas(present: sp.csc_array, activation: Floats) -> Floats:
    """Return the area under the ROC curve of an activation as a detector of each phrase, shape (V,).

    By ranks (Mann-Whitney), (R+ - P (P + 1) / 2) / (P Q) for P samples with the phrase, of rank sum R+, and Q without;
    each phrase has some of both.
    """
    positive = np.asarray(present.sum(axis=0), np.float64).ravel()
    ranks = np.asarray(present.T @ rankdata(activation), np.float64)
    area: Floats = (ranks - positive * (positive + 1) / 2) / (positive * (len(activation) - positive))
    return area


def npmi(has: NDArray[np.bool_], fires: NDArray[np.bool_]) -> float:
    """Return the normalised pointwise mutual information of two events over samples.

    ln( p(w, j) / (p(w) p(j)) ) / -ln p(w, j): 1 if they always go together, 0 if they are independent, -1 if they never
    meet; NaN where either never occurs. Source: Bouma, "Normalized (pointwise) mutual information in collocation
    extraction" (2009).
    """
    joint, p_w, p_j = float((has & fires).mean()), float(has.mean()), float(fires.mean())
    if p_w == 0 or p_j == 0:
        return float("nan")
    if joint in (0.0, 1.0):
        # Always together and always there: the limit of the quotient 0/0 is 1.
        return 1.0 if joint else -1.0
    return float(np.log(joint / (p_w * p_j)) / -np.log(joint))


@dataclass(frozen=True)
class Names:
    """Names of all features.

    Attributes
    ----------
    name : str array, shape (n,)
        A phrase; empty where none is detected well enough.
    npmi : float64 array, shape (n,)
        Of the phrase and the feature firing, on the naming samples.
    auc, low, high : float64 arrays, shape (n,)
        Of the activation as a detector of captions with the phrase, on held-out samples, with its interval. They are of
        the best phrase also where it is under `MIN_AUC` and no name; NaN without any.
    count : int array, shape (n,)
        Groups of held-out samples with the phrase, which the AUC rests on.
    """

    name: NDArray[np.str_]
    npmi: Floats
    auc: Floats
    low: Floats
    high: Floats
    count: NDArray[np.int64]


def name_features(
    z: Activations,
    captions: Sequence[str],
    z_held_out: Activations,
    captions_held_out: Sequence[str],
    groups: NDArray[np.int64] | None = None,
    *,
    min_count: int = 5,
) -> Names:
    """Name features by the phrase that each detects best.

    Parameters
    ----------
    z : activations, shape (N, n)
        Of the naming samples, images or texts.
    captions : sequence of str, length N
        Theirs.
    z_held_out, captions_held_out
        Samples the names are judged on.
    groups : int array, or None
        Of the held-out samples: those that are not independent share a number.
    min_count : int
        Naming captions a phrase must be in to be considered; `MIN_UNITS` held-out groups must have it as well.
    """
    n_features = z.shape[1]
    names = np.full(n_features, "", dtype=object)
    metrics = np.full((4, n_features), np.nan)
    count = np.zeros(n_features, np.int64)
    phrases = Phrases.of(captions, min_count)
    held_out = Phrases.with_vocabulary(captions_held_out, phrases.vocabulary).present.tocsc()
    codes = np.arange(len(captions_held_out)) if groups is None else np.unique(groups, return_inverse=True)[1]
    everywhere = np.diff(held_out.indptr) == len(captions_held_out)
    judged = np.flatnonzero((_groups_with(held_out, codes) >= MIN_UNITS) & ~everywhere)
    present = sp.csr_array(phrases.present.tocsc()[:, judged])
    by_phrase, held_out = present.tocsc(), held_out[:, judged]
    columns, columns_held_out = _by_column(z), _by_column(z_held_out)
    for j in range(n_features):
        activation = _column(columns, j)
        if not len(judged) or not (activation > 0).any():
            continue
        precision = average_precision(present, activation)
        if precision.max() <= 0:
            continue
        near = np.flatnonzero(precision >= NEAR * precision.max())
        best = int(near[areas(by_phrase[:, near], activation).argmax()])
        area = area_under_roc(_column(columns_held_out, j), _column(held_out, best) > 0, codes)
        metrics[:, j] = (
            npmi(_column(by_phrase, best) > 0, activation > 0), area.value, area.low, area.high,
        )  # fmt: skip
        count[j] = area.units
        if area.value >= MIN_AUC:
            names[j] = phrases.vocabulary[judged[best]]
    association, auc, low, high = metrics
    return Names(names.astype(np.str_), association, auc, low, high, count)


def _groups_with(present: sp.csc_array, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many groups have each phrase, shape (V,)."""
    column = np.repeat(np.arange(present.shape[1]), np.diff(present.indptr))
    pairs = np.unique(column * (codes.max(initial=0) + 1) + codes[present.indices])
    return np.bincount(pairs // (codes.max(initial=0) + 1), minlength=present.shape[1])


def _by_column(z: Activations) -> Activations:
    """Return activations in a form that gives columns fast."""
    return z.tocsc() if sp.issparse(z) else z


def _column(columns: Activations, j: int) -> Floats:
    column = columns[:, [j]]
    return np.asarray(column.toarray() if sp.issparse(column) else column, np.float64).ravel()
