"""Batches of the towers' training: partners, captions, augmentation; on a corpus made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.towers.augment import Augment, AugmentSettings
from training.towers.pairs import Corpus, PartnerSampler

TONES = ("light", "dark")
ARTISTS = ("a", "b", "c")


def _corpus():
    """Three artists draw five things in two tones each; `a` alone draws a sixth, and `c` no dark tones."""
    drawn = [
        (artist, f"thing {c}", f"thing {c} {tone} skin tone", tone)
        for artist in ARTISTS
        for c in "pqrst"
        for tone in TONES
        if not (artist == "c" and tone == "dark")
    ]
    drawn += [("a", "lonely thing", "lonely thing", "")]
    icons = [("icons", f"red flag {c}", f"red flag {c}", "") for c in "pqrs"]
    sets, concepts, captions, tones = (np.array(column) for column in zip(*drawn, *icons, strict=True))
    n, emoji = len(sets), len(drawn)
    columns = {
        "set": sets,
        "split": np.array(["train"] * emoji + ["auxiliary"] * (n - emoji)),
        "caption": captions,
        "concept": concepts,
        "tone": tones,
        "restyled": np.array([*range(emoji), *[-1] * (n - emoji)]),
    }
    pixels = np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)
    return Corpus(columns, pixels, pixels[:emoji], pixels[:emoji])


def _sampler(seed=0, without=(), **settings):
    augment = Augment(AugmentSettings(**settings), torch.Generator().manual_seed(seed))
    return PartnerSampler(_corpus(), augment, 0.75, without)


def test_batches_repeat_with_the_seed_and_keep_their_shape():
    one, two = (_sampler(3).batch(16, 12) for _ in range(2))
    assert one.images.shape == (16, 3, 12, 12)
    assert one.paired == 12
    assert torch.equal(one.images, two.images)
    assert one.rows.tolist() == two.rows.tolist()
    assert one.captions.tolist() == two.captions.tolist()


def test_partners_are_of_one_concept_by_two_artists_and_have_the_same_caption_where_it_was_drawn():
    sampler = _sampler()
    columns = sampler.corpus.columns
    drawn = set(zip(columns["set"].tolist(), columns["caption"].tolist(), strict=True))
    chosen, alone, other_tone = set(), 0, 0
    for _ in range(60):
        batch = sampler.batch(16, 8)
        first, second = batch.rows[: batch.paired : 2], batch.rows[1 : batch.paired : 2]
        assert (columns["split"][batch.rows[batch.paired :]] == "auxiliary").all()
        for one, two in zip(first.tolist(), second.tolist(), strict=True):
            assert columns["concept"][one] == columns["concept"][two]
            if columns["concept"][one] == "lonely thing":
                assert one == two
                alone += 1
                continue
            assert columns["set"][one] != columns["set"][two]
            chosen.add((columns["set"][one], columns["set"][two]))
            same = columns["caption"][one] == columns["caption"][two]
            assert same == ((columns["set"][two], columns["caption"][one]) in drawn)
            other_tone += not same
    assert chosen == {(one, two) for one in ARTISTS for two in ARTISTS if one != two}
    assert alone
    assert other_tone


def test_an_artist_left_out_is_drawn_neither_first_nor_as_a_partner():
    sampler = _sampler(without=["b"])
    rows = np.concatenate([sampler.batch(16, 8).rows for _ in range(30)])
    assert set(sampler.corpus.columns["set"][rows]) == {"a", "c", "icons"}
    with pytest.raises(ValueError, match="nobody"):
        _sampler(without=["a", "nobody"])


def test_a_picture_without_its_colour_claims_no_skin_tone():
    batch = _sampler(grey=1.0).batch(16, 12)
    emoji = batch.captions[: batch.paired]
    assert batch.toneless[: batch.paired].all()
    assert not any("skin tone" in caption for caption in emoji)
    kept = _sampler(grey=0.0, hue=0.0, invert=0.0, restyle=0.0).batch(16, 12)
    assert not kept.toneless.any()
    assert sum("skin tone" in caption for caption in kept.captions[: kept.paired]) >= 8


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


def test_light_of_a_drawing_whose_caption_tells_its_tone_changes_by_its_share():
    images = torch.full((400, 3, 2, 2), 0.5)
    names, toned = torch.zeros(400, dtype=torch.bool), torch.arange(400) < 200
    calm = {"grey": 0.0, "hue": 0.0, "invert": 0.0}
    spread = []
    for share in (1.0, 0.3):
        augment = Augment(AugmentSettings(**calm, toned_light=share), torch.Generator().manual_seed(0))
        changed, lost = augment.colour(images, names, toned)
        assert not lost.any()
        spread.append((changed - 0.5).abs().amax((1, 2, 3)))
    full, less = spread
    # The same draws: 0.3 of the change for the toned, all of it for the others. fp32 at values near 0.5.
    torch.testing.assert_close(less[:200], 0.3 * full[:200], atol=1e-6, rtol=0)
    torch.testing.assert_close(less[200:], full[200:], atol=0, rtol=0)
    assert float(full.max()) > 0.15


def test_corruption_erases_boxes_and_adds_noise_to_as_many_as_asked_and_touches_no_other():
    images = torch.full((2000, 3, 16, 16), 0.25)
    augment = Augment(AugmentSettings(erase=0.2, noise=0.0), torch.Generator().manual_seed(0))
    erased = augment.corrupt(images)
    hit = (erased != images).flatten(1).any(1)
    # A binomial share of 0.2 over 2,000, four standard deviations.
    assert 0.16 < float(hit.float().mean()) < 0.24
    assert set(erased.unique().tolist()) == {0.25, 1.0}
    assert float(images.min()) == float(images.max()) == 0.25
    noisy = Augment(AugmentSettings(erase=0.0, noise=0.5), torch.Generator().manual_seed(0)).corrupt(images)
    assert 0.45 < float((noisy != images).flatten(1).any(1).float().mean()) < 0.55
