from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from services import naming
from services.naming import Words, auc, caption_words, name_features, npmi

COLOURS, THINGS = ["red", "green", "blue", "black"], ["cat", "dog", "car", "tree", "hat"]


def world(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Captions "a <colour> <thing>" and features: one a thing, one for red, one at random, one dead."""
    rng = np.random.default_rng(seed)
    colours, things = rng.integers(0, len(COLOURS), n), rng.integers(0, len(THINGS), n)
    captions = [f"A {COLOURS[c]} {THINGS[t]} on the ground" for c, t in zip(colours, things, strict=True)]
    z = np.zeros((n, 8), np.float32)
    z[np.arange(n), things] = rng.random(n) + 0.5
    z[:, 5] = (colours == 0) * (rng.random(n) + 0.5)
    z[:, 6] = rng.random(n) * (rng.random(n) < 0.2)
    return captions, z


def test_words_are_lower_case_without_stop_words():
    assert caption_words("A Cat's red-hot hat, with 3 on the X") == {"cat's", "red", "hot", "hat"}


def test_rare_words_are_left_out():
    words = Words.of(["red cat", "red dog", "red cat"], min_count=2)
    assert words.vocabulary == ("cat", "red")
    assert words.present.toarray().tolist() == [[1, 1], [0, 1], [1, 1]]


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_npmi_is_the_equation(seed):
    rng = np.random.default_rng(seed)
    present = (rng.random((30, 4)) < 0.4).astype(np.float32)
    z = (rng.random((30, 3)) < 0.4).astype(np.float32)
    score = npmi(csr_array(present), z)
    for w in range(4):
        for j in range(3):
            joint, p_w, p_j = (present[:, w] * z[:, j]).mean(), present[:, w].mean(), z[:, j].mean()
            if p_w == 0 or p_j == 0:
                assert np.isnan(score[w, j])
            elif joint == 0:
                assert score[w, j] == -1
            else:
                assert score[w, j] == pytest.approx(np.log(joint / (p_w * p_j)) / -np.log(joint), abs=1e-5)
                assert -1 <= score[w, j] <= 1 + 1e-6


def test_npmi_is_one_for_words_that_always_go_with_a_feature_even_always():
    always, half = np.ones((10, 1), np.float32), (np.arange(10) < 5).astype(np.float32)[:, None]
    assert npmi(csr_array(half), half)[0, 0] == pytest.approx(1.0)
    assert npmi(csr_array(always), always)[0, 0] == 1.0
    assert npmi(csr_array(always), half)[0, 0] == pytest.approx(0.0)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_auc_is_scikit_learns_with_ties(seed):
    rng = np.random.default_rng(seed)
    score, positive = rng.integers(0, 4, 25).astype(float), rng.random(25) < 0.4
    if positive.all() or not positive.any():
        assert np.isnan(auc(score, positive))
    else:
        assert auc(score, positive) == pytest.approx(roc_auc_score(positive, score))


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
def test_features_get_the_words_they_fire_for_and_random_ones_none(form):
    captions, z = world(600, 0)
    captions_held_out, z_held_out = world(300, 1)
    names = name_features(form(z), captions, form(z_held_out), captions_held_out, words=1)
    assert names.name.tolist() == [*THINGS, "red", "", ""]
    assert names.npmi[:6] == pytest.approx(1.0, abs=1e-5)
    assert names.auc[:6].tolist() == [1.0] * 6
    assert np.isnan(names.auc[6:]).all()


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
def test_names_are_the_same_in_blocks_and_no_block_is_larger_than_allowed(form, monkeypatch):
    captions, z = world(600, 0)
    expected = name_features(form(z), captions, form(z), captions)
    sizes = []

    def spy(present, fires):
        sizes.append(fires.shape)
        return npmi(present, fires)

    monkeypatch.setattr(naming, "CELLS", 3 * 600 + 1)
    monkeypatch.setattr(naming, "npmi", spy)
    names = name_features(form(z), captions, form(z), captions)
    assert sizes == [(600, 3), (600, 3), (600, 2)]
    for column in ("name", "npmi", "auc"):
        np.testing.assert_array_equal(getattr(names, column), getattr(expected, column))


def test_the_held_out_auc_exposes_a_name_that_does_not_generalise():
    captions, z = world(600, 0)
    captions_held_out, z_held_out = world(300, 1)
    names = name_features(z, captions, np.roll(z_held_out, 7, axis=0), captions_held_out, words=1)
    assert abs(names.auc[:6] - 0.5).max() < 0.15


def test_a_name_may_have_two_words_best_first():
    captions, z = world(600, 0)
    z[:, 0] = [float("cat" in caption or "car" in caption) for caption in captions]
    names = name_features(z, captions, z, captions, words=2)
    assert set(names.name[0].split(", ")) == {"cat", "car"}
    assert names.auc[0] == 1.0


def test_without_words_nothing_is_named():
    names = name_features(
        np.ones((3, 2), np.float32), ["", "", ""], np.ones((3, 2), np.float32), ["", "", ""]
    )
    assert names.name.tolist() == ["", ""]
