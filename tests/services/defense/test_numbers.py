"""Each formula against an independent one, and the invariants of the detector."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.defense import DefenseCalibration, FilterChoice, FilterMode, Look
from services.defense.detector import Detector, probability
from services.defense.features import suspects
from services.defense.filtering import MODES, rebuild
from services.defense.labels import zero_shot
from services.defense.scores import (
    SIGMA,
    detection_scores,
    instability,
    moved_share,
    reconstruction_error,
    text_share,
)
from services.defense.screen import Screened, choose, screen
from services.defense.smoothing import noise, smooth
from services.errors import InvalidInput, ManifestError
from tests.services.defense.cases import TEXT, D, N, calibration, make_world, statistics
from training.defense.fit import fit_detector

WORLD = make_world()
KNOWN = statistics(WORLD)


def dense(look: Look) -> np.ndarray:
    z = np.zeros(N, np.float64)
    z[look.indices] = look.values
    return z


def test_the_scores_are_their_formulas() -> None:
    look = WORLD.look(WORLD.attacked[3], off=0.7)
    z = dense(look)
    assert reconstruction_error(look, WORLD.rows, WORLD.origin) == pytest.approx(
        np.linalg.norm(look.unit - z @ WORLD.rows), abs=1e-6
    )
    assert text_share(look, KNOWN) == pytest.approx((z[TEXT] ** 2).sum() / (z**2).sum())
    assert moved_share(look, KNOWN) == pytest.approx((z[KNOWN.moved] ** 2).sum() / (z**2).sum())
    assert instability(look, look) == pytest.approx(0, abs=1e-6)


def test_an_image_that_activates_nothing_has_scores() -> None:
    nothing = Look(np.eye(D, dtype=np.float32)[0], np.zeros(0, np.int64), np.zeros(0, np.float32))
    scores = detection_scores(nothing, 0.0, nothing, KNOWN, WORLD.rows, WORLD.origin)
    assert scores.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    (found,) = screen(
        [nothing], [0.0], None, calibration(WORLD, KNOWN), WORLD.rows, WORLD.origin,
        choice=FilterChoice(FilterMode.DROP, False), false_positive_rate=0.05, filter_all=True,
    )  # fmt: skip
    # Nothing is left to point anywhere, so it stays where it was.
    np.testing.assert_array_equal(found.unit, nothing.unit)


def test_scores_do_not_depend_on_the_order_of_the_features() -> None:
    look = WORLD.look(WORLD.attacked[1])
    turned = Look(look.unit, look.indices[::-1], look.values[::-1])
    a, b = (detection_scores(x, 0.3, None, KNOWN, WORLD.rows, WORLD.origin) for x in (look, turned))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert suspects(turned, None, KNOWN).values.tolist() == suspects(look, None, KNOWN).values.tolist()


def test_scores_of_a_batch_are_those_of_its_images() -> None:
    looks = [WORLD.look(z, off) for z, off in zip(WORLD.attacked[:5], (0.0, 0.1, 0.2, 0.3, 0.4), strict=True)]
    smoothed = [WORLD.look(z) for z in WORLD.clean[:5]]
    noises = np.linspace(0, 4, 5)
    together = detection_scores(
        Look.stack(looks), noises, Look.stack(smoothed), KNOWN, WORLD.rows, WORLD.origin
    )
    alone = [
        detection_scores(look, level, smoothed, KNOWN, WORLD.rows, WORLD.origin)
        for look, level, smoothed in zip(looks, noises, smoothed, strict=True)
    ]
    # float32 sums in another order.
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-6)


@pytest.mark.parametrize("mode", list(FilterMode))
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_found_of_an_image_does_not_depend_on_its_batch(mode: FilterMode, keep: bool) -> None:
    z = np.concatenate([WORLD.clean[-20:], WORLD.attacked[-20:]])
    looks = [WORLD.look(row, 0.1) for row in z]
    smoothed = [WORLD.look(row) for row in np.concatenate([WORLD.clean[-20:], WORLD.clean[-20:]])]
    noises = np.zeros(len(looks))
    known = calibration(WORLD, KNOWN)

    def screened(chosen: slice) -> list[Screened]:
        return screen(
            looks[chosen], noises[chosen], smoothed[chosen], known, WORLD.rows, WORLD.origin,
            choice=FilterChoice(mode, keep), false_positive_rate=0.05,
        )  # fmt: skip

    together = screened(slice(None))
    assert {found.was_filtered for found in together} == {True, False}
    for i, found in enumerate(together):
        (alone,) = screened(slice(i, i + 1))
        assert (found.adversarial, found.p_value) == (alone.adversarial, alone.p_value)
        assert found.score == pytest.approx(alone.score, rel=1e-4)
        np.testing.assert_array_equal(found.found.indices, alone.found.indices)
        np.testing.assert_array_equal(found.found.any, alone.found.any)
        np.testing.assert_allclose(found.filtered, alone.filtered, atol=1e-6)
        np.testing.assert_allclose(found.unit, alone.unit, atol=1e-5)


def detector(clean: list[float]) -> Detector:
    one = np.ones(1)
    return Detector(("noise",), one, 0 * one, one, one, 0.0, np.sort(np.array(clean, np.float64)))


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(-6, 6), st.sampled_from([0.01, 0.05, 0.2])
)
@settings(max_examples=200)
def test_the_threshold_and_the_p_value_say_the_same(clean: list[float], logit: float, rate: float) -> None:
    known = detector(clean)
    assert (logit >= known.threshold(rate)) == (known.p_value(logit) <= rate)
    assert 0 < known.p_value(logit) <= 1


def test_p_values_of_exchangeable_images_are_valid() -> None:
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        drawn = rng.standard_normal(100)
        p.append(detector(drawn[:99].tolist()).p_value(drawn[99]))
    for level in (0.05, 0.2, 0.5):
        # Three standard errors of a share of 300.
        assert np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 300)


def test_too_few_clean_images_call_nothing_adversarial() -> None:
    assert detector([0.0] * 50).threshold(0.01) == np.inf
    assert detector([0.0] * 99).threshold(0.01) < np.inf


def test_a_score_that_attacks_lower_gets_no_weight() -> None:
    rng = np.random.default_rng(0)
    clean, attacked = rng.uniform(1, 2, (200, 2)), rng.uniform(1, 2, (200, 2))
    attacked[:, 0] *= 3
    attacked[:, 1] /= 3
    fitted = fit_detector(("noise", "text_share"), clean, attacked, clean)
    assert fitted.weight[0] > 0.5
    assert fitted.weight[1] == 0


def test_the_calibrated_score_is_a_probability_at_even_odds() -> None:
    """Of images scored near 0.7, about 70% are attacked, as many of both having been made."""
    rng = np.random.default_rng(1)
    clean, attacked = np.exp(rng.normal(0, 1, (4000, 1))), np.exp(rng.normal(1.2, 1, (4000, 1)))
    # A penalty of 0 gives the maximum likelihood, which two normals of one width are calibrated under.
    fitted = fit_detector(("noise",), clean[:2000], attacked[:2000], clean[:2000], penalty=0.0)
    scores = [probability(x) for x in fitted.logit(np.r_[clean[2000:], attacked[2000:]])]
    truth = np.r_[np.zeros(2000), np.ones(2000)]
    near = np.abs(np.array(scores) - 0.7) < 0.1
    # Three standard errors of the share, and the floor's small bend of the logarithm.
    assert truth[near].mean() == pytest.approx(0.7, abs=3 * np.sqrt(0.21 / near.sum()) + 0.03)


@pytest.mark.parametrize("mode", list(FilterMode))
def test_an_image_without_suspects_is_rebuilt_as_it_was(mode: FilterMode) -> None:
    look = WORLD.look(WORLD.clean[0], off=0.4)
    found = suspects(look, None, KNOWN)
    kept = MODES[mode](found)
    np.testing.assert_array_equal(kept, found.values)
    np.testing.assert_allclose(
        rebuild(look, None, found, kept, WORLD.rows, WORLD.origin, FilterChoice(mode, True)),
        look.unit,
        atol=1e-6,
    )
    # Without the residual what no feature explains is gone.
    without = rebuild(look, None, found, kept, WORLD.rows, WORLD.origin, FilterChoice(mode, False))
    np.testing.assert_allclose(without, WORLD.look(WORLD.clean[0]).unit, atol=1e-5)


def test_restore_needs_a_second_look_and_choices_default_to_the_bundles() -> None:
    known = calibration(WORLD, KNOWN)
    assert choose(known, None, None, False) == known.choices[False]
    assert choose(known, FilterMode.KEEP_NORMAL, False, True) == FilterChoice(FilterMode.KEEP_NORMAL, False)
    with pytest.raises(InvalidInput) as caught:
        choose(known, FilterMode.RESTORE, None, False)
    assert [path for path, *_ in caught.value.violations] == ["options.mode"]


def test_zero_shot_is_argmax_and_softmax() -> None:
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((7, 5)).astype(np.float32)
    e = rng.standard_normal(5).astype(np.float32)
    logits = 14.0 * (texts @ e).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    found = zero_shot(e, texts, 14.0)
    assert found.index == expected.argmax()
    # float32 cosines: an error of 1e-7 in one is of 14 times that in its weight.
    assert found.probability == pytest.approx(expected.max(), rel=1e-5)
    batch = zero_shot(np.stack([-e, e]), texts, 14.0)
    assert batch.index[1] == found.index
    # float32 sums in another order.
    assert batch.probability[1] == pytest.approx(float(found.probability), rel=1e-4)


def naive_bilateral(image: np.ndarray, sigma: float) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    out = np.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            window = padded[:, y : y + 3, x : x + 3].reshape(3, 9)
            weight = np.exp(-((window - image[:, y, x, None]) ** 2).sum(0) / (2 * sigma**2))
            out[:, y, x] = (window * weight).sum(1) / weight.sum()
    return out


def test_smoothing_is_a_bilateral_filter() -> None:
    image = np.random.default_rng(0).random((3, 7, 6)).astype(np.float32)
    ours = smooth(torch.from_numpy(image)[None], 0.3)[0].numpy()
    np.testing.assert_allclose(ours, naive_bilateral(image, 0.3), atol=1e-6)  # float32


def test_smoothing_keeps_edges_and_flat_ground_and_takes_noise_away() -> None:
    drawing = torch.full((1, 3, 16, 16), 0.2)
    drawing[..., 8:] = 0.8
    assert torch.allclose(smooth(drawing), drawing, atol=1e-6)  # float32
    assert noise(drawing).item() == pytest.approx(0, abs=1e-3)
    noisy = drawing + 4 / 255 * torch.randn(drawing.shape, generator=torch.Generator().manual_seed(0))
    assert (smooth(noisy) - drawing).abs().mean() < 0.7 * (noisy - drawing).abs().mean()
    assert noise(noisy).item() > 1


def test_noise_is_its_formula_and_ignores_brightness_and_shifts() -> None:
    image = np.random.default_rng(0).random((3, 9, 8)).astype(np.float32)
    u = image - image.mean(0)
    windows = [
        np.abs(u[:, y + 1, x + 1] - u[:, y + 1, x] - u[:, y, x + 1] + u[:, y, x]).mean()
        for y in range(8)
        for x in range(7)
    ]
    ours = noise(torch.from_numpy(image)[None]).item()
    assert ours == pytest.approx(255 * np.quantile(windows, 0.25), rel=1e-4)
    grey = torch.from_numpy(image[:1]).expand(3, -1, -1)[None]
    assert noise(grey).item() == pytest.approx(0, abs=1e-3)
    shifted = torch.from_numpy(image)[None] + torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1)
    assert noise(shifted).item() == pytest.approx(ours, rel=1e-4)


def test_noise_is_the_same_where_its_gradient_is_wanted() -> None:
    image = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    wanted = image.clone().requires_grad_()
    level = noise(wanted)
    torch.testing.assert_close(level.detach(), noise(image))
    level.sum().backward()
    assert wanted.grad is not None and wanted.grad.abs().sum() > 0


def test_smoothing_of_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smooth(images)[1:2], smooth(images[1:2]), rtol=0, atol=0)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = calibration(WORLD, KNOWN)
    config, weights = tmp_path / "defense" / "defense.json", tmp_path / "defense" / "defense.safetensors"
    known.write(config, weights)
    read = DefenseCalibration.read(config, weights)
    assert (read.labels, read.choices, read.metrics) == (known.labels, known.choices, known.metrics)
    # Half floats.
    np.testing.assert_allclose(read.label_units, known.label_units, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(read.label_units, axis=1), 1, atol=1e-6)
    for field in dataclasses.fields(read.statistics):
        np.testing.assert_array_equal(getattr(read.statistics, field.name), getattr(KNOWN, field.name))
    scores = np.array([[0.2, 0.1, 0.3, 0.0]])
    assert read.detectors[False].logit(scores) == known.detectors[False].logit(scores)
    assert read.detectors[True].threshold(0.05) == known.detectors[True].threshold(0.05)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sigma", SIGMA / 2),
        ("extra", 1),
        ("labels", ["one"]),
        ("detectors", {}),
        ("choices", {"one_look": {"mode": "GUESS", "keep_residual": True}}),
        ("tolerance", None),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(tmp_path: Path, key: str, value: object) -> None:
    config, weights = tmp_path / "defense.json", tmp_path / "defense.safetensors"
    calibration(WORLD, KNOWN).write(config, weights)
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {key: value}))
    with pytest.raises(ManifestError):
        DefenseCalibration.read(config, weights)
