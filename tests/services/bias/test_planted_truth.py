"""The audit on data whose truth is known: it finds what was planted, and nothing where nothing was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import kstest

import services.bias.audit
from services.bias.ablation import Mode
from services.bias.associate import associate, rank_by_association
from services.bias.audit import AuditSettings, Verdict, audit, audit_scores
from services.bias.cases import MAN, UNGENDERED, WOMAN
from services.bias.gender import gender_scores
from services.bias.leace import Leace
from services.bias.null import null_tests
from services.bias.plan import Plan
from services.errors import NotEnoughItems
from services.modality.modalities import Modality
from tests.services.bias.planted import (
    CONSTANT,
    MAN_FEATURE,
    N_FEATURES,
    SETTINGS,
    STEREOTYPE,
    STEREOTYPED,
    WOMAN_FEATURE,
    World,
    make_world,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def audit_of(world: World, features: list[int], mode: Mode = Mode.ZERO):
    plan = Plan.of_features(world.sides, np.array(features, np.int64), mode)
    return audit(world.cases, world.direction, world.sides, plan, SETTINGS)


def test_the_planted_gender_features_are_the_most_associated_with_gender(world: World) -> None:
    cases = world.cases
    gendered = cases.gender != UNGENDERED
    woman = cases.gender[gendered] == WOMAN
    scores = gender_scores(cases.e[gendered], world.direction)
    gap = scores[woman].mean() - scores[~woman].mean()
    contribution = world.sides[Modality.IMAGE].rows @ world.direction
    found = associate(cases.z[gendered], woman, cases.cluster[gendered], contribution, gap, resamples=200)
    assert set(rank_by_association([found])[:2]) == {WOMAN_FEATURE, MAN_FEATURE}
    assert found.low[WOMAN_FEATURE] > 0.5 and found.high[MAN_FEATURE] < -0.5
    # Nearly all of the gap was planted in these two.
    assert found.share[[WOMAN_FEATURE, MAN_FEATURE]].sum() > 0.9
    # The others have nothing to do with gender; a 95% interval leaves 0 out for one in twenty of them by chance.
    others = np.delete(found.strength, [WOMAN_FEATURE, MAN_FEATURE])
    assert (others > 0).mean() < 0.2


@pytest.mark.parametrize("mode", [Mode.ZERO, Mode.MEAN, Mode.PROJECT])
def test_removing_the_gender_features_is_an_effect_that_random_features_do_not_have(
    world: World, mode: Mode
) -> None:
    found = audit_of(world, [WOMAN_FEATURE, MAN_FEATURE], mode)
    assert found.verdict is Verdict.EFFECT
    assert found.auc.before.value > 0.85
    assert found.auc.after.value < 0.7
    auc = next(test for test in found.nulls if test.measure == "auc")
    # No random pair drawn can do this except the pair itself, which its strata let come up again.
    assert auc.p < 0.02
    assert found.probe.before.value > 0.9
    assert found.probe.difference.high < 0


def test_a_factor_on_all_scores_is_no_effect(world: World) -> None:
    before = gender_scores(world.cases.e, world.direction)
    found = audit_scores(world.cases, before, 0.4 * before, SETTINGS)
    # It moves every probability towards one half, which is what skew at the threshold 0 is made of.
    assert found.raw["skew"].difference.high < -0.05
    assert found.verdict is Verdict.NO_EFFECT
    for change in (found.auc, *found.recalibrated.values()):
        # Scores differ by float64's rounding only.
        assert change.difference.value == pytest.approx(0, abs=1e-9)


def test_a_score_whose_direction_alone_is_removed_is_silenced(world: World) -> None:
    # Gender has a second direction, which the score does not read: what a direction misses is still there.
    rng = np.random.default_rng(5)
    other = rng.normal(size=world.cases.e.shape[1]).astype(np.float32)
    other -= world.direction * (other @ world.direction) / (world.direction @ world.direction)
    other /= np.linalg.norm(other)
    sign = np.select([world.cases.gender == WOMAN, world.cases.gender == MAN], [1.0, -1.0], 0.0)
    e = world.cases.e + 0.3 * sign[:, None].astype(np.float32) * other
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    cases = replace(world.cases, e=e)
    found = audit_of(replace(world, cases=cases), [WOMAN_FEATURE, MAN_FEATURE], Mode.PROJECT)
    assert found.auc.after.value < 0.7 < 0.85 < found.auc.before.value
    assert found.probe.after.value > 0.9
    assert found.verdict is Verdict.SILENCED


def test_what_got_worse_is_named_beside_the_verdict(world: World) -> None:
    found = audit_of(world, [WOMAN_FEATURE, MAN_FEATURE])
    # Genders that are not told any more are told wrongly, in some group in nearly all cases.
    assert "worst_group_accuracy" in found.harms
    assert found.recalibrated["worst_group_accuracy"].difference.high < 0
    assert audit_of(world, []).harms == ()


def test_a_probe_that_no_fold_can_train_is_undefined_and_no_erasure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So few clusters that every one of the women can be in one fold.
    monkeypatch.setattr(services.bias.audit, "MIN_CLUSTERS", 1)
    world = make_world(items=60)
    women_in_one = np.where(world.cases.gender == WOMAN, 0, np.arange(1, 61))
    cases = replace(world.cases, cluster=women_in_one)
    found = audit_of(replace(world, cases=cases), [WOMAN_FEATURE])
    assert np.isnan([found.probe.before.value, found.probe.after.value, found.probe.difference.value]).all()


@pytest.mark.parametrize(
    "cluster",
    [
        lambda gender: np.zeros(len(gender), np.int64),
        lambda gender: np.arange(len(gender)) % 4,
        lambda gender: np.where(gender == WOMAN, 0, np.arange(len(gender))),
    ],
    ids=["one", "four", "one of women"],
)
def test_items_of_too_few_clusters_are_refused_for_their_intervals_would_have_no_width(
    world: World, cluster: Callable[[np.ndarray], np.ndarray]
) -> None:
    cases = replace(world.cases, cluster=cluster(world.cases.gender))
    with pytest.raises(NotEnoughItems, match="independent items"):
        audit_of(replace(world, cases=cases), [WOMAN_FEATURE])


def test_a_skew_of_one_cluster_has_no_interval_and_is_no_effect(world: World) -> None:
    ungendered = world.cases.gender == UNGENDERED
    one = np.where(ungendered, -1, np.arange(len(world.cases)))
    before = gender_scores(world.cases.e, world.direction)
    # All of them are now called women, for certain.
    after = before + 2.0 * ungendered
    found = audit_scores(replace(world.cases, cluster=one), before, after, SETTINGS)
    skew = found.recalibrated["skew"]
    assert skew.difference.value != 0
    assert np.isnan([e.low for e in (skew.before, skew.after, skew.difference)]).all()
    assert found.verdict is Verdict.NO_EFFECT
    # The scores alone were changed, not the embeddings.
    assert audit_scores(world.cases, before, after, SETTINGS).verdict is Verdict.SILENCED


def test_the_figures_of_a_profession_of_one_cluster_have_no_intervals(world: World) -> None:
    guard = world.cases.profession == "guard"
    cases = replace(world.cases, cluster=np.where(guard, -1, np.arange(len(world.cases))))
    of_guard, *others = sorted(
        audit_of(replace(world, cases=cases), [WOMAN_FEATURE]).professions, key=lambda p: p.name != "guard"
    )
    for change in (of_guard.accuracy, of_guard.auc, of_guard.p_woman):
        assert not np.isnan(change.difference.value) and np.isnan(change.difference.low)
    assert not np.isnan([p.p_woman.difference.low for p in others]).any()


def test_removing_no_feature_changes_no_order_and_has_no_p_value(world: World) -> None:
    found = audit_of(world, [])
    assert found.auc.difference.value == 0
    assert found.nulls == () and found.null_energy_ratio is None


def test_removing_what_never_fires_is_no_effect_however_it_rounds(world: World) -> None:
    silent = 7
    fires = np.ones(N_FEATURES, np.float32)
    fires[silent] = 0
    cases = replace(world.cases, z=sp.csr_array(world.cases.z.multiply(fires)))
    found = audit_of(replace(world, cases=cases), [silent])
    assert found.verdict is Verdict.NO_EFFECT
    assert found.raw["skew"].difference.value == 0


def test_removing_the_stereotype_takes_the_skew_of_the_ungendered_and_leaves_gender_itself(
    world: World,
) -> None:
    found = audit_of(world, list(STEREOTYPE))
    skews = {p.name: p.p_woman for p in found.professions}
    for name in STEREOTYPED:
        assert skews[name].before.high < 0.5
        assert skews[name].difference.low > 0.1
    for name in set(skews) - set(STEREOTYPED):
        assert abs(skews[name].difference.value) < 0.02
    gap = found.recalibrated["equal_opportunity_gap"]
    assert gap.before.value > 0.2 and gap.difference.high < 0
    assert found.recalibrated["worst_group_accuracy"].difference.low > 0
    # The skew of the score went, and who is a woman is told as well as before: that is not an erasure of gender.
    assert found.recalibrated["skew"].difference.high < 0
    assert found.verdict is Verdict.SILENCED
    assert found.harms == ()
    assert found.auc.after.value >= found.auc.before.value


def test_a_pure_shift_of_the_threshold_is_no_effect(world: World) -> None:
    before = gender_scores(world.cases.e, world.direction)
    found = audit_scores(world.cases, before, before + 0.15, SETTINGS)
    # The shift does what shifts do: one gender is recognised more, the other less, and skew moves.
    assert found.raw["recall_woman"].difference.low > 0 > found.raw["recall_man"].difference.high
    assert found.raw["skew"].difference.excludes_zero
    assert found.verdict is Verdict.THRESHOLD_ONLY
    for change in (found.auc, *found.recalibrated.values()):
        # Scores differ by float64's rounding only.
        assert change.difference.value == pytest.approx(0, abs=1e-9)


def test_removing_features_that_everybody_has_is_told_from_an_effect(world: World) -> None:
    found = audit_of(world, list(CONSTANT))
    assert found.raw["recall_man"].difference.excludes_zero
    assert found.verdict in (Verdict.THRESHOLD_ONLY, Verdict.NOT_SPECIFIC)


def test_removing_features_that_say_nothing_of_gender_is_not_called_an_effect(world: World) -> None:
    verdicts = [audit_of(world, [j, j + 1]).verdict for j in range(10, 18, 2)]
    # The null is held to 5% over all tests of an audit; four audits rarely hold one false alarm.
    assert verdicts.count(Verdict.EFFECT) <= 1


def test_random_sets_have_uniform_p_values(world: World) -> None:
    rng = np.random.default_rng(1)
    settings = AuditSettings(logit_scale=8.0, null_sets=39)
    cases, found = world.cases.take(np.arange(200)), {}
    for _ in range(200):
        # Of all features: the sets that they are compared with are drawn of all, too.
        features = rng.choice(N_FEATURES, 3, replace=False)
        plan = Plan.of_features(world.sides, features, Mode.ZERO)
        tests, _ = null_tests(cases, world.direction, world.sides, plan, settings, lambda: None)
        for test in tests:
            found.setdefault(test.measure, []).append(test.p)
    # AUC and accuracy take few values: sets that do the same make their p-values larger than uniform, never smaller.
    assert kstest(found["skew"], "uniform").pvalue > 0.01
    for p in found.values():
        assert kstest(p, "uniform", alternative="greater").pvalue > 0.01


def test_a_retrained_probe_finds_gender_where_one_direction_was_emptied(world: World) -> None:
    one = audit_of(world, [WOMAN_FEATURE])
    both = audit_of(world, [WOMAN_FEATURE, MAN_FEATURE])
    assert one.probe.after.low > 0.85
    # What is left is the noise that the dictionary does not hold: nothing that tells the genders.
    assert both.probe.after.value < 0.6
    # Fitted on other items than it is judged on: erasing a sample's own mean difference pushes held-out items below
    # chance, which looks better than it is.
    fitted, judged = (world.cases.take(np.arange(start, 600, 2)) for start in (0, 1))
    gendered = fitted.gender != UNGENDERED
    eraser = Leace.fit(fitted.e[gendered], fitted.gender[gendered] == WOMAN)
    plan = Plan(Mode.LEACE, {Modality.IMAGE: eraser})
    erased = audit(judged, world.direction, world.sides, plan, SETTINGS)
    assert erased.probe.after.value < 0.7 < 0.8 < erased.probe.before.value
    assert erased.nulls == () and erased.null_energy_ratio is None
    assert erased.kept > both.kept


def test_an_audit_asks_in_each_of_its_loops_whether_to_go_on(world: World) -> None:
    asking: set[str] = set()
    plan = Plan.of_features(world.sides, np.array([WOMAN_FEATURE]), Mode.ZERO)
    audit(
        world.cases,
        world.direction,
        world.sides,
        plan,
        SETTINGS,
        lambda: asking.add(sys._getframe(1).f_code.co_name),
    )
    assert asking == {"audit_scores", "metrics", "_professions", "_probe", "probe_scores", "neighbours_kept"}


def test_only_the_professions_that_are_answered_are_computed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.bias.audit, "MAX_PROFESSIONS", 2)
    assert [found.name for found in audit_of(world, [WOMAN_FEATURE]).professions] == ["artist", "guard"]
