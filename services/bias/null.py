"""The matched null: what ablating random features does, of the same number, firing rate and energy.

A set S is compared with sets drawn by permuting membership within strata of features that fire about as often and
carry about as much energy. The members of S may be drawn again, which makes it a permutation test: were S a set like
any other of its strata, its p-value would be uniform. An audit compares by metrics that no threshold can change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy.typing import NDArray

from services.bias.ablation import FeatureAblation, Mode, Side
from services.bias.cases import MIN_ITEMS, UNGENDERED, Cases
from services.bias.gender import gender_scores
from services.bias.measures import (
    Floats,
    Labels,
    best_threshold,
    restored_scale,
    threshold_metrics,
    weighted_auc,
)
from services.bias.plan import Plan
from services.check import Check
from services.modality.modalities import Modality
from services.modality.scores import firing_rates

# A stratum needs others to be drawn from it, or a random set is the set itself.
STRATUM = 24
MAX_STRATA = 24
RATE_BINS = 3
# With more active features an item, the products of its decoder rows take more memory than they save time.
MAX_PRODUCTS = 64
# Items whose decoder rows are gathered at once.
ITEM_BLOCK = 256
# Items that the null is taken on, drawn at random from more: a random set costs the time of these.
NULL_ITEMS = 2_000
# Metrics that a shift of all scores, or a factor on them, cannot change, and so can show an effect; the last two at
# recalibrated thresholds, skew with the spread of the scores restored.
THRESHOLD_FREE = ("auc", "skew", "worst_group_accuracy")

# From a set of features to the scores of all items after its ablation.
Scorer = Callable[[Int[np.ndarray, " s"]], Float[np.ndarray, " n"]]


def feature_strata(rate: Float[np.ndarray, " n"], energy: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return a stratum for each feature: quantiles of energy, and of firing rate within; silent features apart.

    Parameters
    ----------
    rate : float array, shape (n,)
        Share of items that activate each feature.
    energy : float array, shape (n,)
        Sum of squared activations.
    """
    strata = np.zeros(len(rate), np.int64)
    alive = np.flatnonzero(rate > 0)
    wanted = min(MAX_STRATA, max(1, len(alive) // STRATUM))
    rate_bins = RATE_BINS if wanted >= 2 * RATE_BINS else 1
    number = 1
    for band in np.array_split(alive[np.argsort(energy[alive], kind="stable")], wanted // rate_bins):
        for part in np.array_split(band[np.argsort(rate[band], kind="stable")], rate_bins):
            strata[part] = number
            number += 1
    return strata


def matched_sets(
    features: Int[np.ndarray, " s"], strata: Int[np.ndarray, " n"], sets: int, seed: int
) -> Iterator[Int[np.ndarray, " s"]]:
    """Yield random sets with as many features of each stratum as `features` has, each in ascending order."""
    rng = np.random.default_rng(seed)
    wanted = np.bincount(strata[features], minlength=int(strata.max()) + 1)
    pools = [(np.flatnonzero(strata == stratum), count) for stratum, count in enumerate(wanted) if count]
    for _ in range(sets):
        yield np.sort(np.concatenate([rng.choice(pool, count, replace=False) for pool, count in pools]))


def scorer(
    side: Side, e: Float[np.ndarray, "n d"], z: sp.csr_array, direction: Float[np.ndarray, " d"], mode: Mode
) -> Scorer:
    """Return a fast function from a set of features to the scores after its ablation, of one modality's items.

    The same numbers as `FeatureAblation`, which is used as it is where nothing is gained.
    """
    widest = int(np.diff(z.indptr).max(initial=0))
    if mode is Mode.PROJECT or widest > MAX_PRODUCTS:
        return lambda features: gender_scores(FeatureAblation(side, features, mode)(e, z), direction)
    return _SparseScores(side, e, z, direction, mode)


class _SparseScores:
    """Scores after `zero` or `mean` without forming an embedding.

    With y the activations of S: <e', t> = (s - <y, D t> + <c, t>) / ||e'||, and ||e'||^2 by the products of the
    item's own active rows; c is the mean mode's shift, 0 for zero.
    """

    def __init__(
        self,
        side: Side,
        e: Float[np.ndarray, "n d"],
        z: sp.csr_array,
        direction: Float[np.ndarray, " d"],
        mode: Mode,
    ) -> None:
        counts = np.diff(z.indptr)
        width = max(int(counts.max(initial=0)), 1)
        place = np.arange(width)[None] < counts[:, None]
        self._index = np.zeros((len(e), width), np.int64)
        self._index[place] = z.indices
        self._value = np.zeros((len(e), width), np.float32)
        self._value[place] = z.data
        self._side, self._e, self._mode, self._direction = side, e, mode, direction
        self._scores = gender_scores(e, direction)
        self._lengths = np.einsum("nd,nd->n", e, e, dtype=np.float64)
        self._by_direction = side.rows @ direction
        self._by_embedding = np.empty((len(e), width), np.float32)
        self._products = np.empty((len(e), width, width), np.float32)
        for start in range(0, len(e), ITEM_BLOCK):
            part = slice(start, start + ITEM_BLOCK)
            rows = side.rows[self._index[part]]
            self._by_embedding[part] = np.einsum("nkd,nd->nk", rows, e[part], optimize=True)
            self._products[part] = rows @ rows.transpose(0, 2, 1)

    def __call__(self, features: Int[np.ndarray, " s"]) -> Float[np.ndarray, " n"]:
        removed = np.zeros(len(self._side.rows), bool)
        removed[features] = True
        y = np.where(removed[self._index], self._value, np.float32(0))
        score = self._scores - np.einsum("nk,nk->n", y, self._by_direction[self._index])
        square = self._lengths - 2 * np.einsum("nk,nk->n", y, self._by_embedding)
        square += np.einsum("nk,nk->n", (self._products @ y[:, :, None])[:, :, 0], y)
        if self._mode is Mode.MEAN:
            shift = self._side.means[features] @ self._side.rows[features]
            score += float(shift @ self._direction)
            square += float(shift @ shift) + 2 * (self._e @ shift)
            square -= 2 * np.einsum("nk,nk->n", y, (self._side.rows @ shift)[self._index])
        length = np.sqrt(np.maximum(square, 0))
        # Under this nothing but float32's rounding is left of a unit vector; FeatureAblation would return noise.
        result: NDArray[np.float64] = np.divide(score, length, out=np.zeros(len(score)), where=length > 1e-6)
        return result


def p_value(observed: float, null: Float[np.ndarray, " sets"]) -> float:
    """Return the two-sided permutation p-value, the observed set counted in: in (0, 1]; 1 where undefined."""
    if np.isnan(observed):
        return 1.0
    # Sets that differ in float32's rounding only do the same.
    as_much = np.abs(null) >= abs(observed) - 1e-9
    return float((1 + np.count_nonzero(as_much | np.isnan(null))) / (1 + len(null)))


class NullSettings(Protocol):
    """The settings that the null takes; see `services.bias.audit.AuditSettings`."""

    @property
    def logit_scale(self) -> float:
        """The towers' scale of cosines to logits."""

    @property
    def null_sets(self) -> int:
        """Number of random sets."""

    @property
    def min_group(self) -> int:
        """Items of a gender that a profession needs to count."""

    @property
    def seed(self) -> int:
        """Seed of the random sets."""


@dataclass(frozen=True)
class NullTest:
    """The change of a metric by the ablation and by random sets, on the items that the null is taken on."""

    measure: str
    observed: float
    null: Floats
    p: float


def null_tests(
    cases: Cases,
    direction: Float[np.ndarray, " d"],
    sides: Mapping[Modality, Side],
    plan: Plan,
    settings: NullSettings,
    check: Check,
) -> tuple[tuple[NullTest, ...], float | None]:
    """Compare an ablation with random sets; the parameters are those of `services.bias.audit.audit`.

    Returns
    -------
    tuple of NullTest
        One a metric that is defined; none for an ablation without features.
    float or None
        Mean energy of the random sets, relative to the ablated set's; None where that has none.
    """
    if plan.features is None or not len(plan.features):
        return (), None
    if len(cases) > NULL_ITEMS:
        chosen = np.random.default_rng(settings.seed).permutation(len(cases))[:NULL_ITEMS]
        subset = cases.take(np.sort(chosen))
        # A subset without two of each gender cannot be judged; all items then can, if slowly.
        gendered = np.bincount(subset.gender[subset.gender != UNGENDERED], minlength=2)
        cases = subset if gendered.min() >= MIN_ITEMS else cases
    energy = np.asarray((cases.z * cases.z).sum(axis=0)).ravel()
    strata = feature_strata(firing_rates(cases.z), energy)
    of_text = {modality: np.flatnonzero(cases.is_text == (modality is Modality.TEXT)) for modality in sides}
    scorers = [
        (rows, scorer(sides[modality], cases.e[rows], cases.z[rows], direction, plan.mode))
        for modality, rows in of_text.items()
        if len(rows)
    ]
    _, codes = cases.groups()
    labels = Labels(cases.gender, codes, int(codes.max(initial=-1)) + 1, settings.min_group)

    def metrics(features: Int[np.ndarray, " s"]) -> dict[str, float]:
        check()
        scores = np.empty(len(cases))
        for rows, score in scorers:
            scores[rows] = score(features)
        return threshold_free_metrics(before, scores, labels, settings.logit_scale)

    before = gender_scores(cases.e, direction)
    start = threshold_free_metrics(before, before, labels, settings.logit_scale)
    found, drawn, energies = metrics(plan.features), [], []
    for features in matched_sets(plan.features, strata, settings.null_sets, settings.seed):
        drawn.append(metrics(features))
        energies.append(energy[features].sum())
    tests = []
    for measure in THRESHOLD_FREE:
        observed = found[measure] - start[measure]
        null = np.array([one[measure] - start[measure] for one in drawn])
        if not np.isnan(observed):
            tests.append(NullTest(measure, observed, null, p_value(observed, null)))
    own = float(energy[plan.features].sum())
    return tuple(tests), float(np.mean(energies)) / own if own else None


def threshold_free_metrics(
    before: Floats, scores: Floats, labels: Labels, logit_scale: float
) -> dict[str, float]:
    """Return the metrics of THRESHOLD_FREE of `scores` on all items, without intervals."""
    ones = np.ones((1, len(scores)))
    gendered = labels.gender != UNGENDERED
    threshold = best_threshold(scores, labels, ones)
    scale = restored_scale(before, scores, labels, ones, logit_scale)
    metrics = threshold_metrics(scores, labels, ones, threshold, scale)
    auc = weighted_auc(scores[gendered], labels.woman[gendered], ones[:, gendered])
    return {
        "auc": float(auc[0]),
        **{name: float(metrics[name][0]) for name in THRESHOLD_FREE if name in metrics},
    }
