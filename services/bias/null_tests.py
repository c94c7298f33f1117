"""The matched null of an audit: figures that no threshold can change, for the ablation and for random sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from services.bias.ablation import Side
from services.bias.cases import MIN_ITEMS, UNGENDERED, Cases
from services.bias.gender import gender_scores
from services.bias.measures import (
    Floats,
    Labels,
    best_threshold,
    restored_scale,
    threshold_figures,
    weighted_auc,
)
from services.bias.null import feature_strata, matched_sets, p_value, scorer
from services.bias.plan import Plan
from services.check import Check
from services.modality.modalities import Modality
from services.modality.scores import firing_rates

# Items that the null is taken on, drawn at random from more: a random set costs the time of these.
NULL_ITEMS = 2_000
# Figures that a shift of all scores, or a factor on them, cannot change, and so can show an effect; the last two at
# recalibrated thresholds, skew with the spread of the scores restored.
THRESHOLD_FREE = ("auc", "skew", "worst_group_accuracy")


class NullSettings(Protocol):
    """The settings that the null takes; see `services.bias.audit.AuditSettings`."""

    @property
    def logit_scale(self) -> float:
        """Of the towers."""

    @property
    def null_sets(self) -> int:
        """Random sets."""

    @property
    def min_group(self) -> int:
        """Items of a gender that a profession needs to count."""

    @property
    def seed(self) -> int:
        """Of the random sets."""


@dataclass(frozen=True)
class NullTest:
    """The change of a figure by the ablation and by random sets, on the items that the null is taken on."""

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
        One a figure that is defined; none for an ablation without features.
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

    def figures(features: Int[np.ndarray, " s"]) -> dict[str, float]:
        check()
        scores = np.empty(len(cases))
        for rows, score in scorers:
            scores[rows] = score(features)
        return threshold_free_figures(before, scores, labels, settings.logit_scale)

    before = gender_scores(cases.e, direction)
    start = threshold_free_figures(before, before, labels, settings.logit_scale)
    found, drawn, energies = figures(plan.features), [], []
    for features in matched_sets(plan.features, strata, settings.null_sets, settings.seed):
        drawn.append(figures(features))
        energies.append(energy[features].sum())
    tests = []
    for measure in THRESHOLD_FREE:
        observed = found[measure] - start[measure]
        null = np.array([figure[measure] - start[measure] for figure in drawn])
        if not np.isnan(observed):
            tests.append(NullTest(measure, observed, null, p_value(observed, null)))
    own = float(energy[plan.features].sum())
    return tuple(tests), float(np.mean(energies)) / own if own else None


def threshold_free_figures(
    before: Floats, scores: Floats, labels: Labels, logit_scale: float
) -> dict[str, float]:
    """Return the figures of THRESHOLD_FREE of `scores` on all items, without intervals."""
    ones = np.ones((1, len(scores)))
    gendered = labels.gender != UNGENDERED
    threshold = best_threshold(scores, labels, ones)
    scale = restored_scale(before, scores, labels, ones, logit_scale)
    figures = threshold_figures(scores, labels, ones, threshold, scale)
    auc = weighted_auc(scores[gendered], labels.woman[gendered], ones[:, gendered])
    return {
        "auc": float(auc[0]),
        **{name: float(figures[name][0]) for name in THRESHOLD_FREE if name in figures},
    }
