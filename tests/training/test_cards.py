import io

import numpy as np
import scipy.sparse as sp
from PIL import Image

from services.dictionaries import Modality
from training.build.embedded import pick_samples, without_nan
from training.modality.cards import PER_FEATURE, card_rows, thumbnail, top_distinct


def test_a_card_shows_each_concept_once_strongest_first():
    values = np.array([0.1, 0.9, 0.8, 0.0, 0.5])
    concepts = np.array([0, 1, 1, 2, 3])
    assert top_distinct(values, concepts, 5).tolist() == [1, 4, 0]
    assert top_distinct(values, concepts, 2).tolist() == [1, 4]


def test_sparse_and_dense_activations_give_the_same_cards():
    rng = np.random.default_rng(0)
    z = rng.random((40, 6)).astype(np.float32) * (rng.random((40, 6)) < 0.2)
    samples, texts = [f"artist/{i}" for i in range(40)], np.array([f"caption {i}" for i in range(40)])
    concepts = np.arange(40) // 2
    dense = card_rows(z, Modality.IMAGE, samples, texts, concepts)
    assert dense == card_rows(sp.csr_array(z), Modality.IMAGE, samples, texts, concepts)
    assert max(row["rank"] for row in dense) < PER_FEATURE
    assert all(row["activation"] > 0 for row in dense)


def test_a_thumbnail_is_a_small_webp():
    data = thumbnail(np.full((64, 64, 3), 200, np.uint8))
    image = Image.open(io.BytesIO(data))
    assert image.format == "WEBP"
    assert image.size == (48, 48)


def test_samples_are_held_out_visible_and_spread_over_artists():
    n = 60
    columns = {
        "split": np.array(["validation"] * 40 + ["train"] * 20),
        "sibling": np.arange(n) % 10 == 0,
        "tone": np.array([""] * n),
        "concept": np.array([f"concept {i}" for i in range(n)]),
        "category": np.array(["Animals", "Objects", "Flags"] * 20),
        "set": np.array([f"artist {i % 4}" for i in range(n)]),
    }
    pictures = np.zeros((n, 8, 8, 3), np.uint8)
    pictures[::7] = 255
    rows = pick_samples(columns, pictures, 8)
    assert not any(r % 7 == 0 for r in rows)
    assert len(set(rows)) == 8
    assert all(columns["split"][r] == "validation" and not columns["sibling"][r] for r in rows)
    assert all(columns["category"][r] != "Flags" for r in rows)
    artists, counts = np.unique(columns["set"][rows], return_counts=True)
    assert len(artists) == 4
    assert counts.max() == 2


def test_figures_without_a_value_become_null():
    assert without_nan({"a": [float("nan"), 1.0], "b": {"c": "NaN"}}) == {"a": [None, 1.0], "b": {"c": "NaN"}}
