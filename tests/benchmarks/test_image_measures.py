"""Measures of pictures against values known by hand and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from benchmarks.image_measures import Eye, colour_distance, lab, nearest, structure_distance
from training.judging.kid import kid


def pictures(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return blocks.repeat(8, 1).repeat(8, 2)


def test_lab_of_white_black_and_red_is_what_the_standard_says() -> None:
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8).reshape(1, 1, 3, 3)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]
    # Tables print two decimals.
    np.testing.assert_allclose(lab(colours)[0, 0], expected, atol=0.01)


def test_colour_distance_is_the_earth_movers_distance_of_each_channel() -> None:
    a, b = pictures(3, 0), pictures(3, 1)
    x, y = lab(a).reshape(3, -1, 3), lab(b).reshape(3, -1, 3)
    expected = [sum(wasserstein_distance(x[i, :, c], y[i, :, c]) for c in range(3)) for i in range(3)]
    np.testing.assert_allclose(colour_distance(a, b), expected, rtol=1e-9)


def test_structure_ignores_a_change_of_contrast_and_sees_moved_edges() -> None:
    # Greys, so that half the contrast in sRGB keeps where edges are.
    grey = np.where(pictures(4, 2)[..., :1] > 127, 200, 100).astype(np.uint8).repeat(3, -1)
    inverted = 300 - grey.astype(int)
    assert structure_distance(grey, inverted.astype(np.uint8)).max() < 1e-9
    assert structure_distance(grey, np.roll(grey, 5, axis=2)).min() > 0.1


def test_equal_pictures_have_no_distance_and_others_do() -> None:
    a, b = pictures(4, 3), pictures(4, 4)
    eye = Eye()
    texture, perceptual = eye.distances(a, a)
    assert texture.max() < 1e-6
    assert perceptual.max() < 1e-9
    assert min(x.min() for x in eye.distances(a, b)) > 0.01


def test_kid_equals_a_plain_loop_and_knows_equal_from_different_sets() -> None:
    rng = np.random.default_rng(0)
    x, y, shifted = rng.normal(size=(40, 16)), rng.normal(size=(50, 16)), rng.normal(1.0, 1, size=(50, 16))
    scale = np.sqrt(np.square(np.concatenate([x, y])).mean())

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return (u @ v / scale**2 / 16 + 1) ** 3

    within = [
        np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)
    ]
    across = np.mean([kernel(u, v) for u in x for v in y])
    same = kid(x, y)
    assert same.value == pytest.approx(1000 * (sum(within) - 2 * across), rel=1e-6)
    assert same.low < 0 < same.high
    assert kid(x, shifted).low > 0


def test_nearest_finds_the_copy() -> None:
    rng = np.random.default_rng(1)
    bank = rng.normal(size=(30, 8))
    distance, index = nearest(bank[[4, 17]] * 1.0, bank)
    assert index.tolist() == [4, 17]
    assert distance.max() < 1e-9
