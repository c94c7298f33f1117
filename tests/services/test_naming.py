from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, roc_auc_score

from services.modality.naming import (
    MIN_UNITS,
    Phrases,
    areas,
    average_precision,
    caption_words,
    name_features,
    npmi,
    parts,
)

COLOURS, THINGS = ["red", "green", "blue", "black"], ["cat", "dog", "car", "tree", "hat"]


def world(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Captions "A <colour> <thing> on the ground" and features.

    One a thing, one for red, one for red cats, one at random, one dead.
    """
    rng = np.random.default_rng(seed)
    colours, things = rng.integers(0, len(COLOURS), n), rng.integers(0, len(THINGS), n)
    captions = [f"A {COLOURS[c]} {THINGS[t]} on the ground" for c, t in zip(colours, things, strict=True)]
    z = np.zeros((n, 8), np.float32)
    z[np.arange(n), things] = rng.random(n) + 0.5
    z[:, 5] = (colours == 0) * (rng.random(n) + 0.5)
    z[:, 6] = ((colours == 0) & (things == 0)) * (rng.random(n) + 0.5)
    z[:, 7] = rng.random(n) * (rng.random(n) < 0.2)
    return captions, np.hstack([z, np.zeros((n, 1), np.float32)])


def phrases(captions: list[str], min_count: int = 1) -> set[str]:
    return set(Phrases.of(captions, min_count).vocabulary)


def test_a_caption_is_split_at_punctuation_and_words_keep_their_hyphens():
    assert parts("A Cat's T-shirt, with 3 dots - Çok güzel!") == [
        ["a", "cat's", "t-shirt"], ["with", "3", "dots"], ["çok", "güzel"]
    ]  # fmt: skip
    assert caption_words("A Cat's red-hot hat, with 3 on the X") == {"cat's", "red-hot", "hat"}


def test_phrases_are_runs_that_people_wrote_and_neither_start_nor_end_with_a_stop_word():
    found = phrases(["woman with red hair", "woman", "red hair", "man with red hair", "red car", "grey hair"])
    assert {"woman with red hair", "red hair", "woman", "hair", "red"} <= found
    assert not {"with red hair", "woman with", "with"} & found


def test_a_run_that_always_goes_on_the_same_way_is_no_phrase():
    found = phrases(["dark skin tone", "light skin tone", "dark horse"])
    assert "dark skin" not in found
    assert "skin" not in found
    assert {"dark skin tone", "skin tone", "dark"} <= found


def test_two_words_that_only_meet_inside_longer_runs_are_no_phrase():
    """Nobody says "worker medium"; it is where one phrase ends and the next begins."""
    captions = [f"{job} worker medium {shade}" for job in ("office", "health") for shade in ("dark", "light")]
    assert "worker medium" not in phrases([*captions, "health worker", "office worker"])
    assert {"health worker", "office worker"} <= phrases([*captions, "health worker", "office worker"])


def test_rare_phrases_are_left_out():
    found = Phrases.of(["red cat", "red dog", "red cat"], min_count=2)
    assert found.vocabulary == ("red", "red cat")
    assert found.present.toarray().tolist() == [[1, 1], [1, 0], [1, 1]]


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_average_precision_is_scikit_learns_where_the_feature_always_fires(seed):
    rng = np.random.default_rng(seed)
    present = (rng.random((30, 4)) < 0.4).astype(np.float32)
    activation = rng.permutation(30) + 1.0
    found = average_precision(csr_array(present), activation)
    for w in range(4):
        chance = present[:, w].mean()
        if chance in (0.0, 1.0):
            assert found[w] == 0
            continue
        expected = average_precision_score(present[:, w], activation)
        assert found[w] == pytest.approx((expected - chance) / (1 - chance), abs=1e-6)


def test_average_precision_counts_silence_as_not_found():
    # Of 4 samples of the phrase 2 are found, at ranks 1 and 3: (1/1 + 2/3) / 4; 4 of 8 is chance.
    present = np.array([1, 0, 1, 1, 1, 0, 0, 0], np.float32)[:, None]
    found = average_precision(csr_array(present), np.array([5.0, 4.0, 3.0, 0, 0, 0, 0, 0]))
    assert found[0] == pytest.approx(((1 + 2 / 3) / 4 - 0.5) / 0.5)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_npmi_is_the_equation(seed):
    rng = np.random.default_rng(seed)
    has, fires = rng.random(30) < 0.4, rng.random(30) < 0.4
    joint, p_w, p_j = (has & fires).mean(), has.mean(), fires.mean()
    if joint > 0:
        expected = np.log(joint / (p_w * p_j)) / -np.log(joint)
        assert npmi(has, fires) == pytest.approx(expected)
        assert -1 <= npmi(has, fires) <= 1 + 1e-6
    assert npmi(has, ~has) == -1
    assert npmi(np.ones(30, bool), np.ones(30, bool)) == 1


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
def test_features_get_the_phrase_they_fire_for_and_random_ones_none(form):
    captions, z = world(600, 0)
    captions_held_out, z_held_out = world(300, 1)
    names = name_features(form(z), captions, form(z_held_out), captions_held_out)
    assert names.name.tolist() == [*THINGS, "red", "red cat", "", ""]
    assert names.npmi[:7] == pytest.approx(1.0, abs=1e-5)
    assert names.auc[:7].tolist() == [1.0] * 7
    for j, phrase in enumerate(names.name[:7]):
        count = sum(phrase in caption for caption in captions_held_out)
        assert names.count[j] == count
        # Of so many the exact interval of "all".
        assert names.low[j] == pytest.approx(0.025 ** (1 / count))
    assert (names.high[:7] == 1).all()
    # The best phrase of a random feature is no name, and its figures say why; a dead one has none at all.
    assert 0.3 < names.auc[7] < 0.7
    assert np.isnan(names.auc[8])


def test_the_held_out_auc_exposes_a_name_that_does_not_generalise():
    captions, z = world(600, 0)
    captions_held_out, z_held_out = world(300, 1)
    names = name_features(z, captions, np.roll(z_held_out, 7, axis=0), captions_held_out)
    assert abs(names.auc[:6] - 0.5).max() < 0.15
    assert (names.name == "").all()


def test_the_count_is_of_independent_samples_and_too_few_name_nothing():
    """A phrase that one group alone says, however often, has a count of 1, and another name is taken or none."""
    captions, z = world(600, 0)
    captions_held_out, z_held_out = world(300, 1)
    cats = np.array(["red cat" in caption for caption in captions_held_out])
    groups = np.where(cats, 0, np.arange(1, 301))
    names = name_features(z, captions, z_held_out, captions_held_out, groups)
    assert cats.sum() >= MIN_UNITS
    assert names.name[6] != "red cat"
    # All of the red cats count once among the cats.
    assert names.count[0] == sum("cat" in caption for caption in captions_held_out) - cats.sum() + 1


def test_without_words_nothing_is_named():
    names = name_features(
        np.ones((3, 2), np.float32), ["", "", ""], np.ones((3, 2), np.float32), ["", "", ""]
    )
    assert names.name.tolist() == ["", ""]


def test_of_phrases_that_go_with_a_feature_it_is_named_by_the_one_it_detects_best():
    """It fires on red cats alone: "cat" is near in precision, and half of its samples do not fire."""
    captions = ["red cat", "red cat", "grey cat", "red dog", "grey dog", "grey dog"] * 30
    z = np.array([[1.0] if caption == "red cat" else [0.0] for caption in captions], np.float32)
    names = name_features(z, captions, z, captions)
    assert names.name[0] == "red cat"


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_areas_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    present = (rng.random((30, 4)) < 0.4).astype(np.float32)
    present[0], present[1] = 0, 1
    activation = rng.integers(0, 4, 30).astype(float)
    found = areas(csr_array(present).tocsc(), activation)
    assert found == pytest.approx([roc_auc_score(present[:, w], activation) for w in range(4)])
