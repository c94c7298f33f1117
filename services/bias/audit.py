"""`audit`: labelled items and an ablation in, what the ablation really did out.

Four ways to fool oneself are closed. A shift of all scores raises one gender's recall and lowers the other's, so
figures are repeated at recalibrated thresholds; a factor on all scores moves probabilities towards one half, so skew is
then taken with the spread of the scores restored. An effect must show in a figure that neither can change.
Removing any features changes scores, so the same figures are taken for matched random sets. And a score is one
direction of many: a classifier is trained anew on what is left, and where it tells the genders as well as before, the
score was silenced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from jaxtyping import Float, Int

from services.bias.ablation import Side, retained
from services.bias.cases import MAN, MIN_CLUSTERS, UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_scores, probability, unit
from services.bias.linear_probe import probe_scores
from services.bias.measures import (
    OVER_PROFESSIONS,
    Change,
    Floats,
    Labels,
    best_threshold,
    by_chance,
    changes,
    resample_weights,
    restored_scale,
    threshold_metrics,
    weighted_auc,
)
from services.bias.null import THRESHOLD_FREE, NullTest, null_tests
from services.bias.plan import Plan, neighbours_kept
from services.check import Check, nothing
from services.errors import NotEnoughItems
from services.modality.modalities import Modality

LEVEL = 0.05
CURVE_POINTS = 101
# Scores that differ by less are the same, apart from how float32 rounds what an ablation has written back.
ROUNDING = 1e-6
# With figures of their own, the first by name: the contract answers no more, and each takes a bootstrap.
MAX_PROFESSIONS = 1_000
# Figures at recalibrated thresholds that an ablation can make worse, and the sign of a change for the worse.
HARMS = {
    "worst_group_accuracy": -1,
    "equal_opportunity_gap": 1,
    "equalized_odds_gap": 1,
    "demographic_parity_gap": 1,
    "skew": 1,
}
# Figures that are shares of items, and whose: at 0 and 1 their intervals are exact.
SHARES = {"accuracy": (WOMAN, MAN), "recall_woman": (WOMAN,), "recall_man": (MAN,)}
# Whose items each figure of a profession is over.
PROFESSION_ITEMS = {"accuracy": (WOMAN, MAN), "auc": (WOMAN, MAN), "p_woman": (UNGENDERED,)}


class Verdict(StrEnum):
    """What an audit comes to."""

    NO_EFFECT = "NO_EFFECT"
    THRESHOLD_ONLY = "THRESHOLD_ONLY"
    NOT_SPECIFIC = "NOT_SPECIFIC"
    SILENCED = "SILENCED"
    EFFECT = "EFFECT"


@dataclass(frozen=True)
class AuditSettings:
    """How to audit.

    Attributes
    ----------
    logit_scale : float
        Of the towers.
    resamples, null_sets : int
        Of the bootstrap and of the matched null.
    min_group : int
        Items of a gender that a profession needs to count in gaps and in the worst group.
    seed : int
        Of everything random.
    """

    logit_scale: float
    resamples: int = 1000
    null_sets: int = 1000
    min_group: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Profession:
    """The figures of one profession, as in the contract's ProfessionAudit."""

    name: str
    women: int
    men: int
    ungendered: int
    accuracy: Change
    auc: Change
    p_woman: Change


@dataclass(frozen=True)
class Audit:
    """What an ablation did; the contract's AblationAudit says what each field is."""

    verdict: Verdict
    harms: tuple[str, ...]
    auc: Change
    raw: Mapping[str, Change]
    recalibrated: Mapping[str, Change]
    threshold_before: float
    threshold_after: float
    professions: tuple[Profession, ...]
    curve: Float[np.ndarray, "points 5"]
    nulls: tuple[NullTest, ...]
    null_energy_ratio: float | None
    probe: Change
    kept: float
    neighbours_kept: float


def audit(
    cases: Cases,
    direction: Float[np.ndarray, " d"],
    sides: Mapping[Modality, Side],
    plan: Plan,
    settings: AuditSettings,
    check: Check = nothing,
) -> Audit:
    """Audit one ablation on labelled items.

    Parameters
    ----------
    cases : Cases
        The items.
    direction : float array, shape (d,)
        t_F - t_M.
    sides : mapping of Modality to Side
        The dictionary, for the random sets.
    plan : Plan
        The ablation.
    settings : AuditSettings
        How.
    check : callable
        Called between steps; what it raises ends the audit.

    Raises
    ------
    NotEnoughItems
        With items of either gender of fewer than `MIN_CLUSTERS` clusters.
    """
    check_items(cases)
    after = plan.apply(cases)
    before_scores, after_scores = gender_scores(cases.e, direction), gender_scores(after, direction)
    after_scores = np.where(np.abs(after_scores - before_scores) < ROUNDING, before_scores, after_scores)
    return audit_scores(
        cases,
        before_scores,
        after_scores,
        settings,
        check,
        after=after,
        nulls=lambda: null_tests(cases, direction, sides, plan, settings, check),
    )


def audit_scores(
    cases: Cases,
    before: Floats,
    after_scores: Floats,
    settings: AuditSettings,
    check: Check = nothing,
    *,
    after: Float[np.ndarray, "n d"] | None = None,
    nulls: Callable[[], tuple[tuple[NullTest, ...], float | None]] = lambda: ((), None),
) -> Audit:
    """Audit any change of scores: `audit` without the ablation, for a shifted threshold for instance.

    Parameters
    ----------
    cases : Cases
        The items.
    before, after_scores : float64 arrays, shape (N,)
        Scores.
    settings, check
        As for `audit`.
    after : float array, shape (N, d), or None
        Embeddings after; None where they are as before.
    nulls : callable
        Gives the tests against random sets, and their energy relative to the set's.
    """
    check_items(cases)
    after = cases.e if after is None else after
    names, codes = cases.groups()
    labels = Labels(cases.gender, codes, len(names), settings.min_group)
    raw, recalibrated, auc = [], [], []
    thresholds: tuple[Floats, Floats] | None = None
    gendered = cases.gender != UNGENDERED
    for weights in resample_weights(cases.cluster, settings.resamples, settings.seed):
        check()
        pair = [before, after_scores]
        best = [best_threshold(scores, labels, weights) for scores in pair]
        thresholds = thresholds or (best[0], best[1])
        zero = np.zeros(len(weights))
        scale = settings.logit_scale
        raw.append([threshold_metrics(s, labels, weights, zero, scale) for s in pair])
        scales = [restored_scale(before, s, labels, weights, scale) for s in pair]
        recalibrated.append(
            [
                threshold_metrics(s, labels, weights, t, restored)
                for s, t, restored in zip(pair, best, scales, strict=True)
            ]
        )
        auc.append(
            [{"auc": weighted_auc(s[gendered], labels.woman[gendered], weights[:, gendered])} for s in pair]
        )
    if thresholds is None:
        raise NotEnoughItems("there is nothing to audit")
    raw_changes = changes([b for b, _ in raw], [a for _, a in raw])
    recalibrated_changes = changes([b for b, _ in recalibrated], [a for _, a in recalibrated])
    if cases.clusters(UNGENDERED) < MIN_CLUSTERS:
        for found in (raw_changes, recalibrated_changes):
            found["skew"] = found["skew"].without_intervals()
    auc_change = changes([b for b, _ in auc], [a for _, a in auc])["auc"]
    for found in (raw_changes, recalibrated_changes):
        for name, genders in SHARES.items():
            found[name] = found[name].of_share(cases.clusters(*genders))
    cuts = (float(thresholds[0][0]), float(thresholds[1][0]))
    for found, (cut_before, cut_after) in ((raw_changes, (0.0, 0.0)), (recalibrated_changes, cuts)):
        chance = by_chance(before, labels, cut_before, settings.seed)
        chance_after = by_chance(after_scores, labels, cut_after, settings.seed)
        for name in OVER_PROFESSIONS:
            found[name] = replace(
                found[name], before_by_chance=chance[name], after_by_chance=chance_after[name]
            )
    tests, ratio = nulls()
    probe = _probe(cases, after, settings, check)
    return Audit(
        verdict=judge(raw_changes, {"auc": auc_change, **recalibrated_changes}, tests, probe),
        harms=harms(recalibrated_changes),
        auc=auc_change,
        raw=raw_changes,
        recalibrated=recalibrated_changes,
        threshold_before=cuts[0],
        threshold_after=cuts[1],
        professions=_professions(cases, before, after_scores, names, codes, settings, check),
        curve=threshold_curve(before, after_scores, labels),
        nulls=tests,
        null_energy_ratio=ratio,
        probe=probe,
        kept=float(retained(cases.e, after).mean()),
        neighbours_kept=neighbours_kept(cases.e, after, settings.seed, check),
    )


def check_items(cases: Cases) -> None:
    """Raise NotEnoughItems unless the women are of `MIN_CLUSTERS` clusters, and the men."""
    women, men = cases.clusters(WOMAN), cases.clusters(MAN)
    if min(women, men) < MIN_CLUSTERS:
        raise NotEnoughItems(
            f"{women} independent items of women and {men} of men; an audit needs {MIN_CLUSTERS} of each, where items "
            "of one cluster count as one"
        )


def judge(
    raw: Mapping[str, Change],
    threshold_free: Mapping[str, Change],
    tests: tuple[NullTest, ...],
    probe: Change,
) -> Verdict:
    """Say what the figures come to; the null's p-values are held to LEVEL over the number of tests."""
    changed = {
        name
        for name in THRESHOLD_FREE
        if name in threshold_free and threshold_free[name].difference.excludes_zero
    }
    if changed:
        beyond = {test.measure for test in tests if test.p < LEVEL / len(tests)}
        if tests and not changed & beyond:
            return Verdict.NOT_SPECIFIC
        return Verdict.EFFECT if probe.difference.high < 0 else Verdict.SILENCED
    # Of the figures at threshold 0, skew is the one that a factor on all scores moves.
    moved = any(change.difference.excludes_zero for name, change in raw.items() if name != "skew")
    return Verdict.THRESHOLD_ONLY if moved else Verdict.NO_EFFECT


def harms(recalibrated: Mapping[str, Change]) -> tuple[str, ...]:
    """Return the names of the figures of HARMS that got worse, their intervals leaving 0 out."""
    return tuple(
        name
        for name, sign in HARMS.items()
        if name in recalibrated
        and (recalibrated[name].difference.low > 0 if sign > 0 else recalibrated[name].difference.high < 0)
    )


def threshold_curve(before: Floats, after: Floats, labels: Labels) -> Float[np.ndarray, "points 5"]:
    """Return rows of threshold, then the recall of women and of men before, and of women and of men after."""
    gendered = labels.gender != UNGENDERED
    both = np.concatenate([before[gendered], after[gendered]])
    places = np.linspace(both.min(), both.max(), CURVE_POINTS)
    columns = [places]
    for scores in (before, after):
        women, men = np.sort(scores[labels.woman]), np.sort(scores[labels.man])
        columns.append(1 - np.searchsorted(women, places, "right") / len(women))
        columns.append(np.searchsorted(men, places, "right") / len(men))
    return np.stack(columns, axis=1)


def _professions(
    cases: Cases,
    before: Floats,
    after: Floats,
    names: np.ndarray,
    codes: Int[np.ndarray, " n"],
    settings: AuditSettings,
    check: Check,
) -> tuple[Profession, ...]:
    result = []
    for code, name in enumerate(names[:MAX_PROFESSIONS]):
        member = codes == code
        inside = cases.take(member)
        labels = Labels(inside.gender, np.zeros(len(inside), np.int64), 1, settings.min_group)
        gendered, ungendered = inside.gender != UNGENDERED, inside.gender == UNGENDERED
        metrics: list[list[dict[str, Floats]]] = [[], []]
        for weights in resample_weights(inside.cluster, settings.resamples, settings.seed):
            check()
            for side, scores in zip(metrics, (before[member], after[member]), strict=True):
                right = np.where(labels.woman, scores > 0, scores <= 0)
                p = probability(scores[ungendered], settings.logit_scale)
                side.append(
                    {
                        "accuracy": _mean(right[gendered].astype(np.float64), weights[:, gendered]),
                        "auc": weighted_auc(scores[gendered], labels.woman[gendered], weights[:, gendered]),
                        "p_woman": _mean(p, weights[:, ungendered]),
                    }
                )
        women, men = int(labels.woman.sum()), int(labels.man.sum())
        found = {
            name: change
            if inside.clusters(*PROFESSION_ITEMS[name]) >= MIN_CLUSTERS
            else change.without_intervals()
            for name, change in changes(metrics[0], metrics[1]).items()
        }
        found["accuracy"] = found["accuracy"].of_share(inside.clusters(*PROFESSION_ITEMS["accuracy"]))
        result.append(Profession(str(name), women, men, int(ungendered.sum()), **found))
    return tuple(result)


def _mean(values: Floats, weights: Floats) -> Floats:
    total = weights.sum(1)
    mean: Floats = np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
    return mean


def _probe(cases: Cases, after: Float[np.ndarray, "n d"], settings: AuditSettings, check: Check) -> Change:
    gendered = cases.gender != UNGENDERED
    woman, cluster = cases.gender[gendered] == WOMAN, cases.cluster[gendered]
    labels = Labels(cases.gender[gendered], np.full(len(woman), -1), 0, settings.min_group)
    margins = [
        probe_scores(unit(e[gendered]), woman, cluster, settings.seed, check) for e in (cases.e, after)
    ]
    # NaN is not above 0: without this, items that no fold could tell would all be called men.
    decided = ~np.isnan(margins[0])
    metrics: list[list[dict[str, Floats]]] = [[], []]
    for weights in resample_weights(cluster, settings.resamples, settings.seed):
        check()
        for side, scores in zip(metrics, margins, strict=True):
            zero = np.zeros(len(weights))
            side.append(threshold_metrics(scores, labels, weights * decided, zero, settings.logit_scale))
    return changes(metrics[0], metrics[1])["balanced_accuracy"]
