"""The figures of an audit against independent implementations and brute force."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from fairlearn.metrics import (
    demographic_parity_difference,
    equal_opportunity_difference,
    equalized_odds_difference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from services.bias.ablation import FeatureAblation, Mode, Side, retained
from services.bias.activations import GATHER, Stacked, decode_part
from services.bias.associate import associate
from services.bias.audit import AuditSettings, audit_scores
from services.bias.calibration import BiasCalibration, DictionaryCalibration, ModalityCalibration
from services.bias.cases import MAN, UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_direction, gender_scores, probability
from services.bias.leace import Leace
from services.bias.linear_probe import PENALTIES, cluster_folds, probe_scores
from services.bias.measures import (
    OVER_PROFESSIONS,
    Estimate,
    Labels,
    best_threshold,
    by_chance,
    resample_weights,
    threshold_metrics,
    weighted_auc,
)
from services.bias.null import feature_strata, matched_sets, p_value, scorer
from services.bias.plan import Plan, neighbours_kept
from services.errors import ManifestError
from services.modality.modalities import Modality
from tests.services.bias.planted import make_world

SEEDS = st.integers(0, 2**32 - 1)


def random_labels(rng: np.random.Generator, n: int = 200) -> Labels:
    gender = rng.choice([WOMAN, MAN, UNGENDERED], n)
    gender[:4] = [WOMAN, WOMAN, MAN, MAN]
    return Labels(gender, rng.integers(-1, 5, n), 5, 3)


@settings(max_examples=15)
@given(SEEDS)
def test_the_weighted_auc_is_scikit_learns_ties_included(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    positive[:2] = [True, False]
    weights = rng.integers(0, 3, (3, 60)).astype(float)
    weights[:, :2] = 1
    found = weighted_auc(scores, positive, weights)
    expected = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    # Sums of at most 180 terms in float64.
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_an_auc_without_one_of_the_classes_is_undefined() -> None:
    assert np.isnan(weighted_auc(np.arange(3.0), np.ones(3, bool), np.ones((1, 3)))).all()
    assert np.isnan(weighted_auc(np.empty(0), np.empty(0, bool), np.ones((2, 0)))).all()


@settings(max_examples=15)
@given(SEEDS)
def test_gaps_over_professions_are_fairlearns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_labels(rng)
    scores = rng.normal(size=len(labels.gender)) + 0.5 * labels.woman
    metrics = threshold_metrics(scores, labels, np.ones((1, len(scores))), np.array([0.1]), 1.0)
    gendered = labels.gender != UNGENDERED
    truth, called = labels.woman[gendered], scores[gendered] > 0.1
    assert metrics["accuracy"][0] == pytest.approx(accuracy_score(truth, called))
    assert metrics["balanced_accuracy"][0] == pytest.approx(balanced_accuracy_score(truth, called))
    grouped = gendered & (labels.group >= 0)
    arguments = {
        "y_true": labels.woman[grouped], "y_pred": scores[grouped] > 0.1, "sensitive_features": labels.group[grouped],
    }  # fmt: skip
    # With 200 items every profession has more than min_group of either gender.
    assert metrics["equal_opportunity_gap"][0] == pytest.approx(equal_opportunity_difference(**arguments))
    assert metrics["equalized_odds_gap"][0] == pytest.approx(equalized_odds_difference(**arguments))
    assert metrics["demographic_parity_gap"][0] == pytest.approx(demographic_parity_difference(**arguments))


def test_a_gap_by_chance_is_its_mean_over_professions_dealt_anew() -> None:
    rng = np.random.default_rng(0)
    labels = random_labels(rng)
    # Of profession 0 everybody is called a woman: a gap that is none of chance's.
    scores = np.where(labels.group == 0, 1.0, rng.normal(size=len(labels.gender)))
    found = by_chance(scores, labels, 0.1, seed=0)
    dealt = []
    for _ in range(1000):
        group = labels.group.copy()
        for gender in (WOMAN, MAN):
            side = np.flatnonzero((labels.gender == gender) & (group >= 0))
            group[side] = group[rng.permutation(side)]
        metrics = threshold_metrics(
            scores, replace(labels, group=group), np.ones((1, len(scores))), np.array([0.1]), 1.0
        )
        dealt.append([metrics[name][0] for name in OVER_PROFESSIONS])
    mean, spread = np.mean(dealt, axis=0), np.std(dealt, axis=0)
    # 5 standard errors of a mean over 200 permutations, and the brute force's own.
    for name, expected, deviation in zip(OVER_PROFESSIONS, mean, spread, strict=True):
        assert found[name] == pytest.approx(expected, abs=5 * deviation * (1 / 200 + 1 / 1000) ** 0.5)
    own = threshold_metrics(scores, labels, np.ones((1, len(scores))), np.array([0.1]), 1.0)
    assert own["equal_opportunity_gap"][0] > found["equal_opportunity_gap"] + 0.2
    assert np.isnan(by_chance(scores, labels, float("nan"), seed=0)["equal_opportunity_gap"])


def test_the_worst_group_is_the_smallest_accuracy_of_any_group_that_is_large_enough() -> None:
    gender = np.array([WOMAN] * 6 + [MAN] * 6)
    group = np.array([0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 1])
    scores = np.array([1, 1, -1, -1, -1, -1, -1, -1, -1, 1, -1, -1.0])
    labels = Labels(gender, group, 3, 3)
    metrics = threshold_metrics(scores, labels, np.ones((1, 12)), np.zeros(1), 1.0)
    # Women: 2 of 6. Professions of three: women of 0 have 2/3, men of 0 have 1, men of 1 have 2/3.
    assert metrics["worst_group_accuracy"][0] == pytest.approx(2 / 6)
    assert metrics["gender_gap"][0] == pytest.approx(5 / 6 - 2 / 6)


@settings(max_examples=15)
@given(SEEDS)
def test_no_threshold_beats_the_best_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_labels(rng, 40)
    scores = rng.integers(-5, 5, 40) / 5
    weights = np.concatenate([np.ones((1, 40)), rng.integers(0, 3, (2, 40))])
    weights[:, :4] = 1
    found = best_threshold(scores, labels, weights)
    for w, threshold in zip(weights, found, strict=True):

        def balanced(t: float, w: np.ndarray = w) -> float:
            return float(
                threshold_metrics(scores, labels, w[None], np.array([t]), 1.0)["balanced_accuracy"][0]
            )

        candidates = np.concatenate([[-9.0, 9.0], np.unique(scores) + 0.1])
        # The tie-break on the gap costs 1e-6 at most.
        assert balanced(threshold) >= max(map(balanced, candidates)) - 1e-6


@settings(max_examples=10)
@given(SEEDS, st.floats(-2, 2))
def test_a_shift_of_all_scores_changes_nothing_at_recalibrated_thresholds(seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    labels = random_labels(rng)
    scores = rng.normal(size=len(labels.gender))
    weights = np.ones((1, len(scores)))
    metrics = [
        threshold_metrics(s, labels, weights, best_threshold(s, labels, weights), 3.0)
        for s in (scores, scores + shift)
    ]
    for name in metrics[0]:
        # Only the rounding of the shift itself is left; the threshold lies midway between scores.
        np.testing.assert_allclose(metrics[0][name], metrics[1][name], atol=1e-6)


def test_resamples_draw_whole_clusters_and_the_first_row_is_everything() -> None:
    cluster = np.array([5, 5, 9, 7, 9])
    blocks = list(resample_weights(cluster, 50, 0))
    weights = np.concatenate(blocks)
    assert weights.shape == (51, 5) and (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 4]).all()
    assert (weights[1:, [0, 2, 3]].sum(1) == 3).all()


def random_side(rng: np.random.Generator, n: int = 60, d: int = 16) -> Side:
    rows = rng.normal(size=(n, d)).astype(np.float32)
    return Side(rows / np.linalg.norm(rows, axis=1, keepdims=True), rng.uniform(0, 0.2, n).astype(np.float32))


def random_cases(rng: np.random.Generator, side: Side, items: int = 30) -> tuple[np.ndarray, sp.csr_array]:
    n, d = side.rows.shape
    e = rng.normal(size=(items, d)).astype(np.float32)
    z = np.where(rng.random((items, n)) < 0.15, rng.uniform(0, 1, (items, n)), 0).astype(np.float32)
    return e / np.linalg.norm(e, axis=1, keepdims=True), sp.csr_array(z)


@pytest.mark.parametrize("mode", [Mode.ZERO, Mode.MEAN, Mode.PROJECT])
def test_ablations_are_their_equations(mode: Mode) -> None:
    rng = np.random.default_rng(0)
    side = random_side(rng)
    e, z = random_cases(rng, side)
    features = np.array([3, 11, 40])
    dense = z.toarray()[:, features]
    rows = side.rows[features]
    expected = {
        Mode.ZERO: e - dense @ rows,
        Mode.MEAN: e + (side.means[features] - dense) @ rows,
        Mode.PROJECT: e - e @ np.linalg.pinv(rows) @ rows,
    }[mode]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    ablation = FeatureAblation(side, features, mode)
    found = ablation(e, z)
    # float32 products of 16 terms.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(retained(e, found), np.einsum("nd,nd->n", e, expected), atol=1e-5)
    assert ablation.active(z).tolist() == (dense != 0).sum(1).tolist()
    stacked = Stacked(z.data, z.indices, z.indptr)
    np.testing.assert_array_equal(ablation(e, stacked), found)


def test_removing_every_direction_leaves_nothing_and_says_nothing() -> None:
    rng = np.random.default_rng(0)
    side = random_side(rng)
    e, z = random_cases(rng, side)
    found = FeatureAblation(side, np.arange(60), Mode.PROJECT)(e, z)
    # What float32 leaves of nothing is a direction of noise, unless it is zero; the score must not show it.
    scores = gender_scores(found, rng.normal(size=16).astype(np.float32))
    assert np.isfinite(scores).all()


def test_sums_over_many_active_features_do_not_depend_on_how_they_are_gathered() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(900, 4)).astype(np.float32)
    # One input alone has more features than are gathered at once would hold of others.
    z = sp.csr_array(np.where(rng.random((40, 900)) < 0.6, 1.0, 0).astype(np.float32))
    assert z.nnz > 2 * GATHER
    chosen = rng.random(900) < 0.9
    np.testing.assert_allclose(
        decode_part(z, chosen, rows), z.toarray()[:, chosen] @ rows[chosen], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", [Mode.ZERO, Mode.MEAN, Mode.PROJECT])
def test_the_fast_scores_of_the_null_are_the_ablations(mode: Mode) -> None:
    rng = np.random.default_rng(1)
    side = random_side(rng)
    e, z = random_cases(rng, side)
    direction = rng.normal(size=16).astype(np.float32)
    score = scorer(side, e, z, direction, mode)
    for size in (1, 5, 12):
        features = rng.choice(60, size, replace=False)
        expected = gender_scores(FeatureAblation(side, features, mode)(e, z), direction)
        # Scores of length-4 directions after float32 sums of squares.
        np.testing.assert_allclose(score(features), expected, atol=1e-4)


def test_random_sets_match_the_strata_of_the_set() -> None:
    rng = np.random.default_rng(0)
    rate, energy = rng.uniform(0, 1, 500), rng.exponential(size=500)
    rate[:20] = energy[:20] = 0
    strata = feature_strata(rate, energy)
    assert (strata[:20] == 0).all() and (strata[20:] > 0).all()
    features = rng.choice(500, 30, replace=False)
    sets = np.stack(list(matched_sets(features, strata, 50, 0)))
    for drawn in sets:
        assert len(set(drawn)) == 30
        assert (
            np.bincount(strata[drawn], minlength=30).tolist()
            == np.bincount(strata[features], minlength=30).tolist()
        )
    assert len({tuple(drawn) for drawn in sets}) == 50
    # Within a stratum energies are of one quantile: the sets' mean energy is near the set's own.
    assert energy[sets].sum(1).mean() == pytest.approx(energy[features].sum(), rel=0.25)


def test_random_sets_are_drawn_one_at_a_time() -> None:
    strata = np.ones(4_000, np.int64)
    sets = matched_sets(np.arange(2_000), strata, 1_000, 0)
    tracemalloc.start()
    for _ in range(1_000):
        next(sets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All of them would be 16 MB.
    assert peak < 1_000_000


def test_a_p_value_counts_the_observed_set_and_both_sides() -> None:
    null = np.array([-3.0, -1.0, 0.0, 1.0, 2.0])
    assert p_value(2.0, null) == pytest.approx((1 + 2) / 6)
    assert p_value(-4.0, null) == pytest.approx(1 / 6)
    assert p_value(float("nan"), null) == 1


def test_leace_leaves_no_linear_trace_and_moves_less_than_dropping_the_mean_difference() -> None:
    rng = np.random.default_rng(0)
    covariance = np.diag([9.0, 1.0, 1.0, 0.1])
    x = rng.multivariate_normal(np.zeros(4), covariance, 4000)
    woman = rng.random(4000) < 0.4
    x[woman] += [2.0, 1.0, 0, 0]
    e = x.astype(np.float32)
    eraser = Leace.fit(e, woman)
    erased = eraser.raw(e)
    # Theorem 3.1 of the paper: no linear classifier can tell the classes if and only if their means are equal.
    np.testing.assert_allclose(erased[woman].mean(0), erased[~woman].mean(0), atol=1e-4)
    gap = e[woman].mean(0) - e[~woman].mean(0)
    along = gap / np.linalg.norm(gap)
    dropped = e - ((e - e.mean(0)) @ along)[:, None] * along
    # Both are erasures; LEACE is the one that changes least in the Mahalanobis norm, and here in the plain one.
    inverse = np.linalg.inv(np.cov(e.T))

    def moved(y: np.ndarray) -> float:
        return float(np.einsum("nd,de,ne->n", y - e, inverse, y - e).mean())

    assert moved(erased) < moved(dropped)


def test_the_probe_is_ridge_regression_on_folds_of_whole_clusters() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    woman = x[:, 0] + rng.normal(size=200) > 0
    cluster = np.repeat(np.arange(50), 4)
    fold = cluster_folds(cluster, 0)
    assert all(len(set(fold[cluster == c])) == 1 for c in range(50))
    margins = probe_scores(x, woman, cluster)
    found = balanced_accuracy_score(woman, margins > 0)
    best = 0.0
    for penalty in PENALTIES:
        called = np.empty(200, bool)
        for k in range(5):
            fitted = fold != k
            # The penalty is relative to the mean variance of a weighted mean; scikit-learn's to a sum.
            alpha = penalty * float(x[fitted].var(0).mean()) * fitted.sum()
            model = RidgeClassifier(alpha=alpha, class_weight="balanced").fit(x[fitted], woman[fitted])
            called[~fitted] = model.predict(x[~fitted])
        best = max(best, balanced_accuracy_score(woman, called))
    # Theirs centres and scales a little differently: a few items of 200 near the border may differ.
    assert found == pytest.approx(best, abs=0.03)


def test_an_association_is_the_correlation_and_its_interval_holds_it() -> None:
    world = make_world()
    gendered = world.cases.gender != UNGENDERED
    z, woman = world.cases.z[gendered], world.cases.gender[gendered] == WOMAN
    found = associate(z, woman, np.arange(len(woman)), np.ones(z.shape[1]), 1.0, resamples=200)
    expected = np.nan_to_num([np.corrcoef(column, woman)[0, 1] for column in z.toarray().T])
    np.testing.assert_allclose(found.value, expected, atol=1e-5)
    inside = (found.low <= found.value + 1e-9) & (found.value <= found.high + 1e-9)
    assert inside.mean() > 0.95


def test_the_probability_is_the_softmax_over_the_two_prompts() -> None:
    rng = np.random.default_rng(0)
    woman, man = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    e = rng.normal(size=(5, 8))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    t = [p.mean(0) / np.linalg.norm(p.mean(0)) for p in (woman, man)]
    logits = 20 * np.stack([e @ t[0], e @ t[1]], axis=1)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    direction = gender_direction(woman, man)
    np.testing.assert_allclose(probability(gender_scores(e, direction), 20), softmax[:, 0], atol=1e-5)
    assert probability(np.array([1e6]), 100.0).tolist() == [1.0]


def test_neighbours_are_all_kept_by_no_change_and_few_by_chance() -> None:
    rng = np.random.default_rng(0)
    e = rng.normal(size=(200, 20)).astype(np.float32)
    assert neighbours_kept(e, e, 0) == 1
    # Ten of 199 by chance is 5%.
    assert neighbours_kept(e, rng.normal(size=(200, 20)).astype(np.float32), 0) < 0.15


def test_a_plan_changes_each_modality_by_its_own_rows() -> None:
    rng = np.random.default_rng(0)
    world = make_world(items=40)
    sides = {Modality.IMAGE: world.sides[Modality.IMAGE], Modality.TEXT: random_side(rng, 120, 128)}
    cases = world.cases
    mixed = cases.__class__(**{**vars(cases), "is_text": np.arange(40) % 2 == 1})
    plan = Plan.of_features(sides, np.array([0, 1, 2]), Mode.ZERO)
    found = plan.apply(mixed)
    for modality, rows in ((Modality.IMAGE, slice(0, None, 2)), (Modality.TEXT, slice(1, None, 2))):
        expected = FeatureAblation(sides[modality], np.array([0, 1, 2]), Mode.ZERO)(
            cases.e[rows], cases.z[rows]
        )
        np.testing.assert_array_equal(found[rows], expected)


def test_a_calibration_survives_the_disk_and_a_wrong_one_is_refused(tmp_path) -> None:
    rng = np.random.default_rng(0)
    world = make_world(items=60)
    gendered = world.cases.gender != UNGENDERED
    woman = world.cases.gender[gendered] == WOMAN
    association = associate(
        world.cases.z[gendered], woman, np.arange(len(woman)), np.ones(120), 1.0, resamples=100
    )
    side = ModalityCalibration(world.sides[Modality.IMAGE].means, association)
    eraser = Leace.fit(world.cases.e[gendered], woman)
    made = BiasCalibration(
        "f" * 64,
        {"woman": ("a woman",), "man": ("a man",)},
        world.direction,
        dict.fromkeys(Modality, 0.25),
        dict.fromkeys(Modality, eraser),
        {"sae": DictionaryCalibration(rng.permutation(120).astype(np.int32), dict.fromkeys(Modality, side))},
        {"chosen": "top 4, zero"},
    )
    config, weights = tmp_path / "bias" / "bias.json", tmp_path / "bias" / "bias.safetensors"
    made.write(config, weights)
    read = BiasCalibration.read(config, weights)
    assert (
        read.thresholds == made.thresholds and read.prompts == made.prompts and read.metrics == made.metrics
    )
    np.testing.assert_array_equal(read.direction, made.direction)
    np.testing.assert_array_equal(read.leace[Modality.TEXT].u, eraser.u)
    np.testing.assert_array_equal(read.dictionaries["sae"].rank, made.dictionaries["sae"].rank)
    np.testing.assert_allclose(
        read.dictionaries["sae"].sides[Modality.IMAGE].association.low, association.low, atol=1e-6
    )
    config.write_text(config.read_text().replace('"thresholds"', '"limits"'))
    with pytest.raises(ManifestError):
        BiasCalibration.read(config, weights)


def test_a_share_that_is_all_or_nothing_has_an_exact_interval():
    """64 of 64 is 94% to 100%; a bootstrap says 100% to 100%."""
    certain = Estimate(1.0, 1.0, 1.0).of_share(64)
    assert (certain.value, certain.high) == (1.0, 1.0)
    assert certain.low == pytest.approx(binomtest(64, 64).proportion_ci(method="exact").low)
    never = Estimate(0.0, 0.0, 0.0).of_share(64)
    assert (never.low, never.high) == (0.0, pytest.approx(1 - certain.low))
    between = Estimate(0.5, 0.4, 0.6)
    assert between.of_share(64) == between
    # Too few to draw from stays without an interval.
    assert np.isnan(Estimate(1.0, float("nan"), float("nan")).of_share(2).low)


def test_an_audit_says_how_sure_a_recall_of_all_is():
    rng = np.random.default_rng(0)
    gender = np.repeat([WOMAN, MAN], 20)
    e = np.where(gender[:, None] == WOMAN, [1.0, 0.0], [-1.0, 0.0]) + 0.01 * rng.normal(size=(40, 2))
    no = np.zeros(40, bool)
    z = sp.csr_array((40, 1), dtype=np.float32)
    cases = Cases(e.astype(np.float32), z, no, gender, np.full(40, ""), np.arange(40))
    scores = e[:, 0].astype(np.float64)
    found = audit_scores(cases, scores, scores, AuditSettings(logit_scale=10.0, resamples=100))
    recall = found.raw["recall_woman"].before
    assert (recall.value, recall.high) == (1.0, 1.0)
    assert recall.low == pytest.approx(0.025 ** (1 / 20))
