"""Splits, restyling and sampling of the corpus, on rows and documents made here: no npm package is needed."""

from __future__ import annotations

import numpy as np
import torch

from training.augment import Augment, AugmentSettings
from training.corpus.build import assign_splits
from training.corpus.svg import Style, document, rasterise
from training.pairs import Corpus, PairSampler

BLUE_SQUARE = {"body": '<rect x="4" y="4" width="8" height="8" fill="#00f"/>'}
DEFAULTS = {"width": 16, "height": 16}


def _rows(concepts=200, sets=("noto", "noto-v1", "twemoji")):
    families = {"noto-v1": "noto"}
    return [
        {
            "set": s,
            "family": families.get(s, s),
            "role": "train",
            "concept": f"concept {c}",
            "caption": f"concept {c}",
        }
        for c in range(concepts)
        for s in sets
    ]


def test_held_out_concepts_are_still_drawn_by_others():
    rows = _rows()
    assign_splits(rows, share=0.4)
    held = [r for r in rows if r["split"] == "validation"]
    trained = {r["concept"] for r in rows if r["split"] == "train"}
    assert held
    assert {r["concept"] for r in held} <= trained


def test_the_split_of_a_pair_does_not_depend_on_other_rows():
    few, many = _rows(50), _rows(400)
    assign_splits(few)
    assign_splits(many)
    by_pair = {(r["concept"], r["set"]): r["split"] for r in many}
    assert all(by_pair[r["concept"], r["set"]] == r["split"] for r in few)


def test_a_sibling_is_a_held_out_drawing_whose_family_was_trained_on():
    rows = _rows()
    assign_splits(rows, share=0.4)
    trained = {(r["concept"], r["family"]) for r in rows if r["split"] == "train"}
    for row in rows:
        expected = row["split"] == "validation" and (row["concept"], row["family"]) in trained
        assert row["sibling"] == expected


def test_test_and_auxiliary_rows_are_never_trained_on_as_emoji():
    rows = [{"set": "openmoji", "family": "openmoji", "role": "test", "concept": "x", "caption": "x"}]
    assign_splits(rows)
    assert rows[0]["split"] == "test"


def test_styles_draw_the_fill_an_outline_or_lines_only():
    plain, outlined, lines = (rasterise(document(BLUE_SQUARE, DEFAULTS, s, 0.1), 32) for s in Style)
    assert plain[16, 16].tolist() == outlined[16, 16].tolist() == [0, 0, 255]
    assert lines[16, 16].tolist() == [255, 255, 255]
    assert plain[16, 8].tolist() == [0, 0, 255]
    assert outlined[16, 8].tolist() == lines[16, 8].tolist() == [0, 0, 0]
    assert plain[1, 1].tolist() == [255, 255, 255]


def test_a_wide_drawing_is_centred_on_white():
    wide = rasterise(document({"body": BLUE_SQUARE["body"], "width": 32, "height": 16}, DEFAULTS), 32)
    assert wide.shape == (32, 32, 3)
    assert (wide[:8] == 255).all()
    assert (wide[-8:] == 255).all()


def _corpus():
    rows = 12
    columns = {
        "set": np.array(["a"] * 8 + ["icons"] * 4),
        "split": np.array(["train"] * 8 + ["auxiliary"] * 4),
        "caption": np.array([f"thing {c} skin tone" for c in "pqrstuvw"] + ["red flag"] * 4),
        "concept": np.array([f"thing {c}" for c in "pqrstuvw"] + ["red flag"] * 4),
        "restyled": np.array([*range(8), *[-1] * 4]),
    }
    pixels = np.random.default_rng(0).integers(0, 255, (rows, 16, 16, 3), dtype=np.uint8)
    return Corpus(columns, pixels, pixels[:8], pixels[:8])


def test_batches_repeat_with_the_seed_and_keep_their_shape():
    batches = []
    for _ in range(2):
        sampler = PairSampler(_corpus(), Augment(AugmentSettings(), torch.Generator().manual_seed(3)), 0.5)
        batches.append(sampler.batch(8, 12))
    assert batches[0].images.shape == (8, 3, 12, 12)
    assert torch.equal(batches[0].images, batches[1].images)
    assert batches[0].captions == batches[1].captions


def test_a_picture_without_its_colour_claims_no_skin_tone():
    settings = AugmentSettings(grey=1.0)
    sampler = PairSampler(_corpus(), Augment(settings, torch.Generator().manual_seed(0)), 0.5)
    batch = sampler.batch(8, 12)
    emoji = [
        caption for caption, concept in zip(batch.captions, batch.concepts, strict=True) if "thing" in concept
    ]
    assert emoji
    assert not any("skin tone" in caption for caption in emoji)


def test_a_caption_that_names_a_colour_keeps_its_colours():
    augment = Augment(AugmentSettings(grey=1.0, invert=1.0), torch.Generator().manual_seed(0))
    images = torch.rand(4, 3, 8, 8)
    _, recoloured = augment.colour(images, torch.tensor([True, True, False, False]))
    assert recoloured.tolist() == [False, False, True, True]


def test_what_lies_outside_a_moved_drawing_is_white_paper():
    augment = Augment(
        AugmentSettings(scale=(0.5, 0.5), rotate=0.0, translate=0.0, stretch=0.0), torch.Generator()
    )
    moved = augment.geometry(torch.zeros(1, 3, 16, 16), 16, torch.tensor([False]))
    assert moved[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0]
    assert moved[0, :, 8, 8].tolist() == [0.0, 0.0, 0.0]
