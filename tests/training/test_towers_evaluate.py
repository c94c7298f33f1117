"""The evaluation on a corpus made here, whose right answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from training.towers.embed import EmbeddingSet
from training.towers.evaluate import Evaluation, colour_features, pixel_features
from training.towers.pairs import Corpus

CONCEPTS = ("man", "woman", "disc", "ring")


def _picture(concept: int, rng: np.random.Generator) -> np.ndarray:
    picture = np.full((16, 16, 3), 255, dtype=np.uint8)
    y, x = divmod(concept, 2)
    picture[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = [40 * concept, 255 - 60 * concept, 90]
    return np.clip(picture.astype(int) - rng.integers(0, 5, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def evaluation():
    rng = np.random.default_rng(0)
    n = 24
    concept = np.arange(n) % 4
    captions = np.array(sorted(CONCEPTS))
    names = np.array(CONCEPTS)[concept]
    caption = np.searchsorted(captions, names)
    columns = {
        "set": np.array(["noto"] * n),
        "split": np.array(["train"] * 12 + ["validation"] * 8 + ["test"] * 4),
        "caption": names,
        "concept": names,
        "category": np.where(concept < 2, "People", "Shapes"),
        "gender": np.where(concept < 2, names, ""),
        "tone": np.array([""] * n),
        "sibling": np.arange(n) % 3 == 0,
        "restyled": np.full(n, -1),
    }
    pixels = np.stack([_picture(c, rng) for c in concept])
    texts = np.eye(4, dtype=np.float32)
    images = texts[caption] + 0.05 * rng.standard_normal((n, 4)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    embeddings = EmbeddingSet(
        fingerprint="x",
        logit_scale=10.0,
        rows=np.arange(n),
        images=images,
        image_norm=np.ones(n, np.float32),
        caption=caption,
        part=np.array(["fit"] * 12 + ["validation"] * 8 + ["test"] * 4),
        view_images=images[:0],
        view_caption=caption[:0],
        captions=captions,
        texts=texts[None],
        text_norm=np.ones((1, 4), np.float32),
    )
    return Evaluation(Corpus(columns, pixels, pixels, pixels), embeddings)


def test_good_towers_and_easy_pictures_are_told_apart_by_every_method(evaluation):
    metrics = evaluation.validation()
    assert metrics["towers"]["image_to_text"][1]["value"] == 1.0
    assert metrics["pixels"][1].value == metrics["colours"][1].value == 1.0
    # One concept of either gender: an AUC of 1 says nothing of others.
    assert metrics["gender"] == {"auc": {"value": 1.0, "low": pytest.approx(0.025), "high": 1.0}, "n": 4}
    assert metrics["strict"]["queries"] < metrics["towers"]["queries"]
    assert set(metrics["by_category"]) == {"People", "Shapes"}


def test_the_test_artist_is_measured_on_captions_that_training_has(evaluation):
    assert evaluation.test()["towers"]["queries"] == 4


def test_colours_alone_cannot_tell_where_the_ink_is():
    pictures = np.full((2, 16, 16, 3), 255, dtype=np.uint8)
    pictures[0, :8], pictures[1, 8:] = 0, 0
    colour, pixel = colour_features(pictures), pixel_features(pictures)
    assert float(colour[0] @ colour[1]) == pytest.approx(1.0, abs=1e-6)
    assert float(pixel[0] @ pixel[1]) == pytest.approx(0.0, abs=1e-6)


def test_a_blank_picture_has_no_ink_and_no_nan():
    blank = np.full((1, 16, 16, 3), 255, dtype=np.uint8)
    assert np.isfinite(pixel_features(blank)).all()
    assert np.isfinite(colour_features(blank)).all()
