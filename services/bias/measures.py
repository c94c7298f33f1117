"""Metrics of a gender classifier, each on all items and on bootstrap resamples of their clusters at once.

A resample is a row of weights, shape (R, N): how often each item's cluster was drawn. Every figure below takes such
weights and returns one number a row, so that a difference between two classifiers is paired by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from services.bias.cases import MAN, UNGENDERED, WOMAN
from services.bias.gender import probability
from services.intervals import exact_end

Floats = NDArray[np.float64]
# Weights of so many items are held at once, over all resamples of a block: 8 MB an array.
BLOCK_ITEMS = 1_000_000
# The largest minus the smallest of many groups, and the worst of them, are far apart by chance alone.
OVER_PROFESSIONS = (
    "worst_group_accuracy",
    "equal_opportunity_gap",
    "equalized_odds_gap",
    "demographic_parity_gap",
)
PERMUTATIONS = 200


@dataclass(frozen=True)
class Estimate:
    """A figure on all items with its 95% percentile bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Floats) -> Estimate:
        """Summarise a figure, shape (1 + R,): first on all items, then on the resamples."""
        rest = draws[1:][~np.isnan(draws[1:])]
        if np.isnan(draws[0]) or not len(rest):
            return cls(float(draws[0]), float("nan"), float("nan"))
        low, high = np.quantile(rest, [0.025, 0.975])
        return cls(float(draws[0]), float(low), float(high))

    def of_share(self, units: int) -> Estimate:
        """Return a share's estimate with an exact interval at 0 and 1, where a bootstrap has nothing to draw."""
        if self.value not in (0.0, 1.0) or np.isnan(self.low):
            return self
        end = exact_end(units)
        return Estimate(
            self.value, self.value - end * (self.value == 1), self.value + end * (self.value == 0)
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Change:
    """A figure before and after, and the paired difference, after minus before.

    Attributes
    ----------
    before_by_chance, after_by_chance : float
        Of a figure over professions, its mean where professions are dealt anew (`by_chance`); NaN for others.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    before_by_chance: float = float("nan")
    after_by_chance: float = float("nan")

    @classmethod
    def of(cls, before: Floats, after: Floats) -> Change:
        """Summarise two metrics taken on the same resamples."""
        return cls(Estimate.of(before), Estimate.of(after), Estimate.of(after - before))

    def of_share(self, units: int) -> Change:
        """Return the change of a share of independent units, the figures themselves with exact intervals at 0 and 1."""
        return replace(self, before=self.before.of_share(units), after=self.after.of_share(units))

    def without_intervals(self) -> Change:
        """Return the figures alone, for items of too few clusters to draw from."""
        nan = float("nan")
        before, after, difference = (
            Estimate(e.value, nan, nan) for e in (self.before, self.after, self.difference)
        )
        return replace(self, before=before, after=after, difference=difference)


@dataclass(frozen=True)
class Labels:
    """What is known of the items, for the metrics.

    Attributes
    ----------
    gender : int array, shape (N,)
        WOMAN, MAN or UNGENDERED.
    group : int array, shape (N,)
        Number of the profession, -1 for none.
    groups : int
        How many professions there are.
    min_group : int
        Items of a gender that a profession needs to count in gaps and in the worst group.
    """

    gender: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " n"]
    groups: int
    min_group: int

    @property
    def woman(self) -> Bool[np.ndarray, " n"]:
        """Items of women."""
        return np.asarray(self.gender == WOMAN)

    @property
    def man(self) -> Bool[np.ndarray, " n"]:
        """Items of men."""
        return np.asarray(self.gender == MAN)

    def cells(self) -> sp.csr_array:
        """Membership of items in (profession, gender), shape (N, 2 groups): women's columns, then men's."""
        member = np.flatnonzero((self.group >= 0) & (self.gender != UNGENDERED))
        column = self.group[member] + np.where(self.woman[member], 0, self.groups)
        ones = np.ones(len(member))
        return sp.csr_array((ones, (member, column)), shape=(len(self.gender), 2 * self.groups))


def resample_weights(
    cluster: Int[np.ndarray, " n"], resamples: int, seed: int
) -> Iterator[Float[np.ndarray, "block n"]]:
    """Yield blocks of weights, 1 + `resamples` rows in all; the first row is 1 throughout."""
    _, codes = np.unique(cluster, return_inverse=True)
    clusters = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    yield np.ones((1, len(codes)))
    block = max(1, BLOCK_ITEMS // len(codes))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        counts = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size)
        yield counts.astype(np.float64)[:, codes]


def weighted_auc(scores: Floats, positive: Bool[np.ndarray, " n"], weights: Floats) -> Floats:
    """Return the area under the ROC curve for each row of weights, ties counting half; NaN with one class only."""
    order = np.argsort(scores, kind="stable")
    s, w, is_positive = scores[order], weights[:, order], positive[order]
    negatives = np.cumsum(np.where(is_positive, 0.0, w), axis=1)
    below = np.concatenate([np.zeros((len(w), 1)), negatives], axis=1)
    chosen = s[is_positive]
    rank = below[:, np.searchsorted(s, chosen, "left")] + below[:, np.searchsorted(s, chosen, "right")]
    w_positive = w[:, is_positive]
    return _divide((w_positive * rank).sum(1), 2 * w_positive.sum(1) * below[:, -1])


def best_threshold(scores: Floats, labels: Labels, weights: Floats) -> Floats:
    """Return for each row of weights the threshold of the best balanced accuracy; among equals, the smallest gap.

    Candidates lie midway between neighbouring scores of gendered items, and beyond both ends.
    """
    gendered = labels.gender != UNGENDERED
    order = np.flatnonzero(gendered)[np.argsort(scores[gendered], kind="stable")]
    s, w, woman = scores[order], weights[:, order], labels.woman[order]
    women, men = (np.cumsum(np.where(side, w, 0.0), axis=1) for side in (woman, ~woman))
    zero = np.zeros((len(w), 1))
    recall_woman = 1 - _divide(np.concatenate([zero, women], 1), women[:, -1:])
    recall_man = _divide(np.concatenate([zero, men], 1), men[:, -1:])
    quality = recall_woman + recall_man - 1e-6 * np.abs(recall_woman - recall_man)
    # A cut between two equal scores is no cut.
    cut = np.concatenate([[True], s[1:] > s[:-1], [True]])
    quality = np.where(cut, quality, -np.inf)
    places = np.concatenate([[s[0] - 1e-6], (s[1:] + s[:-1]) / 2, [s[-1] + 1e-6]])
    undefined = np.isnan(recall_woman[:, 0]) | np.isnan(recall_man[:, 0])
    best = np.argmax(np.where(np.isnan(quality), -np.inf, quality), axis=1)
    return np.where(undefined, np.nan, places[best])


def gendered_spread(scores: Floats, labels: Labels, weights: Floats) -> Floats:
    """Return for each row of weights the standard deviation of the scores of gendered items."""
    gendered = labels.gender != UNGENDERED
    s, w = scores[gendered], weights[:, gendered]
    total = w.sum(1)
    mean = _divide(w @ s, total)
    return np.sqrt(_divide((w * (s[None] - mean[:, None]) ** 2).sum(1), total))


def restored_scale(
    before: Floats, after: Floats, labels: Labels, weights: Floats, logit_scale: float
) -> Floats:
    """Return for each row of weights the logit scale at which the scores after spread as those before.

    A skew that is taken at this scale does not change when all scores are multiplied by one number. NaN where the
    scores after do not spread beyond what float32 rounds.
    """
    spread = gendered_spread(after, labels, weights)
    return logit_scale * _divide(
        gendered_spread(before, labels, weights), np.where(spread > 1e-6, spread, 0.0)
    )


def threshold_metrics(
    scores: Floats, labels: Labels, weights: Floats, threshold: Floats, logit_scale: float | Floats
) -> dict[str, Floats]:
    """Return every figure that depends on a threshold, by the names of the contract's GenderMeasures.

    Parameters
    ----------
    scores : float64 array, shape (N,)
        s of each item.
    labels : Labels
        Of the items.
    weights : float64 array, shape (R, N)
        Resamples.
    threshold : float64 array, shape (R,)
        A score above it is called a woman.
    logit_scale : float, or float64 array, shape (R,)
        For the skew, mean |P(F) - 0.5| over ungendered items.
    """
    woman_called = (scores[None] > threshold[:, None]) * weights
    recall_woman = _share(woman_called, weights, labels.woman)
    recall_man = 1 - _share(woman_called, weights, labels.man)
    gendered = weights[:, labels.woman].sum(1) + weights[:, labels.man].sum(1)
    right = recall_woman * weights[:, labels.woman].sum(1) + recall_man * weights[:, labels.man].sum(1)
    # A threshold that no resample defines must not look like one that calls everybody a man.
    valid = np.where(np.isnan(threshold), np.nan, 1.0)
    metrics = {
        "accuracy": _divide(right, gendered),
        "balanced_accuracy": (recall_woman + recall_man) / 2,
        "recall_woman": recall_woman,
        "recall_man": recall_man,
        "gender_gap": np.abs(recall_woman - recall_man),
        "skew": _skew(scores, labels, weights, threshold, logit_scale),
        **_group_metrics(woman_called, labels, weights, np.minimum(recall_woman, recall_man)),
    }
    return {name: value * valid for name, value in metrics.items()}


def by_chance(scores: Floats, labels: Labels, threshold: float, seed: int) -> dict[str, float]:
    """Return each of OVER_PROFESSIONS as its mean where professions are dealt anew among the items of each gender.

    What the figure comes to where no profession differs from another: a gap over many small professions is large, and
    its bootstrap interval does not reach 0 (permutation null; `PERMUTATIONS` times).

    Parameters
    ----------
    scores : float64 array, shape (N,)
        s of each item.
    labels : Labels
        Of the items.
    threshold : float
        A score above it is called a woman.
    seed : int
        Of the permutations.
    """
    sides = [np.flatnonzero(side & (labels.group >= 0)) for side in (labels.woman, labels.man)]
    is_called = (scores[np.concatenate(sides)] > threshold).astype(np.float64)
    rng = np.random.default_rng(seed)
    called = np.zeros((PERMUTATIONS, 2 * labels.groups))
    for row in called:
        women, men = (rng.permutation(labels.group[side]) for side in sides)
        row += np.bincount(np.concatenate([women, labels.groups + men]), is_called, len(row))
    # Each profession keeps its number of women and of men.
    total = np.broadcast_to(np.asarray(labels.cells().sum(axis=0), np.float64).ravel(), called.shape)
    worst = np.full(
        PERMUTATIONS, min((scores[labels.woman] > threshold).mean(), (scores[labels.man] <= threshold).mean())
    )
    metrics = _over_professions(called, total, labels, worst)
    return {name: np.nan if np.isnan(threshold) else float(rows.mean()) for name, rows in metrics.items()}


def _group_metrics(
    woman_called: Floats, labels: Labels, weights: Floats, worst_gender: Floats
) -> dict[str, Floats]:
    cells = labels.cells()
    return _over_professions((cells.T @ woman_called.T).T, (cells.T @ weights.T).T, labels, worst_gender)


def _over_professions(
    called: Floats, total: Floats, labels: Labels, worst_gender: Floats
) -> dict[str, Floats]:
    """Fairlearn's differences with profession as the sensitive feature, of numbers by profession and gender."""
    size = np.asarray(labels.cells().sum(axis=0)).ravel()
    counts_enough = size >= labels.min_group
    share = _divide(called, total)
    women, men = share[:, : labels.groups], 1 - share[:, labels.groups :]
    enough_women, enough_men = counts_enough[: labels.groups], counts_enough[labels.groups :]
    both = enough_women & enough_men
    selected = _divide(
        called[:, : labels.groups] + called[:, labels.groups :],
        total[:, : labels.groups] + total[:, labels.groups :],
    )
    women_gap, men_gap = _spread(women[:, enough_women]), _spread(men[:, enough_men])
    groups = np.concatenate([women[:, enough_women], men[:, enough_men]], axis=1)
    return {
        "worst_group_accuracy": np.fmin(worst_gender, _nan(np.nanmin, groups)),
        "equal_opportunity_gap": women_gap,
        "equalized_odds_gap": np.fmax(women_gap, men_gap),
        "demographic_parity_gap": _spread(selected[:, both]),
    }


def _skew(
    scores: Floats, labels: Labels, weights: Floats, threshold: Floats, logit_scale: float | Floats
) -> Floats:
    ungendered = labels.gender == UNGENDERED
    scale = np.broadcast_to(logit_scale, threshold.shape)
    p = probability(scale[:, None] * (scores[ungendered][None] - threshold[:, None]), 1.0)
    w = weights[:, ungendered]
    return _divide((np.abs(p - 0.5) * w).sum(1), w.sum(1))


def _share(called: Floats, weights: Floats, members: Bool[np.ndarray, " n"]) -> Floats:
    return _divide(called[:, members].sum(1), weights[:, members].sum(1))


def _divide(a: Floats, b: Floats) -> Floats:
    ratio: Floats = np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)
    return ratio


def _spread(share: Floats) -> Floats:
    """Largest minus smallest of each row; NaN with fewer than two columns or nothing drawn of all but one."""
    if share.shape[1] < 2:
        return np.full(len(share), np.nan)
    return _nan(np.nanmax, share) - _nan(np.nanmin, share)


def _nan(reduce: Callable[..., Floats], rows: Floats) -> Floats:
    """Reduce each row over what is not NaN; NaN where all of it is."""
    if rows.shape[1] == 0:
        return np.full(len(rows), np.nan)
    empty = np.asarray(np.isnan(rows).all(1))
    return np.where(empty, np.nan, reduce(np.where(empty[:, None], 0.0, rows), axis=1))


def changes(
    before: Sequence[Mapping[str, Floats]], after: Sequence[Mapping[str, Floats]]
) -> dict[str, Change]:
    """Join the blocks of figures before and after and summarise each."""
    return {
        name: Change.of(
            np.concatenate([block[name] for block in before]),
            np.concatenate([block[name] for block in after]),
        )
        for name in before[0]
    }
