"""Where the truth is planted, the defence finds it; where there is nothing to find, it finds nothing."""

from __future__ import annotations

import numpy as np

from services.defense import FilterChoice, FilterMode, Reason, screen
from services.defense.features import suspects
from tests.services.defense.cases import ATTACKED, all_scores, calibration, make_world, statistics
from training.defense.measure import auroc

WORLD = make_world()
KNOWN = statistics(WORLD)


def test_the_features_that_the_attack_moves_are_found_and_no_others() -> None:
    assert np.flatnonzero(KNOWN.moved).tolist() == ATTACKED.tolist()


def test_an_attack_that_does_nothing_moves_nothing() -> None:
    rng = np.random.default_rng(3)
    jitter = WORLD.clean * rng.uniform(0.9, 1.1, WORLD.clean.shape).astype(np.float32)
    moved = statistics(WORLD, attacked=jitter).moved
    # 20 features at two standard errors, one-sided: half a false alarm is expected, and none among the silent ones.
    assert moved.sum() <= 3
    assert not moved[20:].any()


def test_the_calibrated_score_tells_attacked_images_apart_on_images_it_was_not_fitted_on() -> None:
    known = calibration(WORLD, KNOWN).detectors[False]
    half = len(WORLD.clean) // 2
    clean = known.logit(all_scores(WORLD, WORLD.clean[half:], KNOWN))
    attacked = known.logit(all_scores(WORLD, WORLD.attacked[half:], KNOWN))
    # Clean images have no energy at all on the planted features.
    assert auroc(clean, attacked)["value"] == 1.0
    assert (clean >= known.threshold(0.05)).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / half)


def test_without_an_attack_the_score_is_at_chance() -> None:
    """The null: "attacked" images that are other clean images."""
    known = statistics(WORLD, attacked=WORLD.clean)
    other = make_world(seed=5)
    half = len(WORLD.clean) // 2
    detector = calibration(WORLD, KNOWN).detectors[False]
    clean = detector.logit(all_scores(WORLD, WORLD.clean[half:], known))
    same = detector.logit(all_scores(WORLD, other.clean[half:], known))
    figure = auroc(clean, same)
    assert figure["low"] <= 0.5 <= figure["high"]


def test_filtering_gives_back_the_clean_embedding() -> None:
    known = calibration(WORLD, KNOWN)
    z, attacked = WORLD.clean[-1], WORLD.attacked[-1]
    (found,) = screen(
        [WORLD.look(attacked)], [0.0], None, known, WORLD.rows, WORLD.origin,
        choice=FilterChoice(FilterMode.DROP, keep_residual=True), false_positive_rate=0.05,
    )  # fmt: skip
    assert found.adversarial and found.was_filtered
    clean = WORLD.look(z)
    # Rows are orthonormal, so dropping the planted features is exact; float32.
    np.testing.assert_allclose(found.unit, clean.unit, atol=2e-6)
    assert WORLD.look(attacked).unit @ clean.unit < 0.95
    moved = found.found.indices[found.found.reasons[Reason.MOVED]]
    assert moved.tolist() == ATTACKED.tolist()


def test_a_clean_image_is_left_alone() -> None:
    known = calibration(WORLD, KNOWN)
    look = WORLD.look(WORLD.clean[-1])
    (found,) = screen(
        [look], [0.0], None, known, WORLD.rows, WORLD.origin,
        choice=FilterChoice(FilterMode.DROP, keep_residual=True), false_positive_rate=0.01,
    )  # fmt: skip
    assert not found.adversarial and not found.was_filtered
    assert found.unit is look.unit
    assert not found.found.any.any()


def test_restoring_takes_the_smoothed_pictures_activations_where_they_differ() -> None:
    attacked, smoothed = WORLD.look(WORLD.attacked[-1]), WORLD.look(WORLD.clean[-1])
    (found,) = screen(
        [attacked], [0.0], [smoothed], calibration(WORLD, KNOWN), WORLD.rows, WORLD.origin,
        choice=FilterChoice(FilterMode.RESTORE, keep_residual=False), false_positive_rate=0.05, filter_all=True,
    )  # fmt: skip
    assert found.found.reasons[Reason.UNSTABLE].any()
    # All that differ by more than the tolerance are restored; what is within it may stay.
    np.testing.assert_allclose(found.filtered, found.found.smoothed, atol=KNOWN.tolerance)


def test_what_clean_images_never_have_is_unseen_and_excessive() -> None:
    z = np.zeros_like(WORLD.clean[0])
    z[[0, 25]] = (5.0, 0.1)
    found = suspects(WORLD.look(z), None, KNOWN)
    assert found.indices.tolist() == [0, 25]
    assert found.reasons[Reason.UNSEEN].tolist() == [False, True]
    assert found.reasons[Reason.EXCESS].tolist() == [True, True]
    assert not found.reasons[Reason.UNSTABLE].any()


def test_restoring_with_the_residual_keeps_the_smoothed_pictures() -> None:
    """An attack outside every feature is in the residual, so that is not the one to keep."""
    attacked, smoothed = WORLD.look(WORLD.attacked[-1], off=0.8), WORLD.look(WORLD.clean[-1], off=0.1)
    (found,) = screen(
        [attacked], [0.0], [smoothed], calibration(WORLD, KNOWN), WORLD.rows, WORLD.origin,
        choice=FilterChoice(FilterMode.RESTORE, keep_residual=True), false_positive_rate=0.05, filter_all=True,
    )  # fmt: skip
    # Within the tolerance of the few features that were not restored.
    assert found.unit @ smoothed.unit > 0.995
    assert attacked.unit @ smoothed.unit < 0.9
