"""The bundle that ships: whole, small, free of the test artist, and of use."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import SAMPLES, Bundle
from services.bundle.towers import load_towers
from services.encoding.images import ImagePreprocess, load_pixels
from services.encoding.texts import Tokenizer

MB = 1_000_000


@pytest.fixture(scope="module")
def embedded():
    return Bundle.load(EMBEDDED_BUNDLE)


def test_it_verifies_and_stays_within_its_sizes(embedded):
    sizes = {path: file.bytes for path, file in embedded.manifest.files.items()}
    assert sum(size for path, size in sizes.items() if path.startswith("clip/")) <= 40 * MB
    assert sum(sizes.values()) <= 90 * MB


def test_its_pipeline_has_the_settings_that_were_chosen(embedded):
    record = json.loads((EMBEDDED_BUNDLE / "diffusion" / "choice.json").read_text())
    entry, chosen = embedded.manifest.diffusion, record["chosen"]
    assert (entry.num_inference_steps, entry.guidance_scale) == (chosen["steps"], chosen["guidance"])
    (row,) = [row for row in record["table"] if row["stage"] == "steps" and row["chosen"]]
    assert {name: row[name] for name in chosen} == chosen
    assert row["not_worse_than_the_best"] and record["captions"] >= 50


def test_every_dictionary_can_be_listed_and_shown(embedded):
    for name in embedded.manifest.dictionaries:
        assert len(embedded.modality(name).label) == embedded.dictionary(name).n_features
        cards = embedded.cards(name)
        for feature in range(embedded.dictionary(name).n_features):
            for modality in ("image", "text"):
                examples = cards.top(feature, modality, 3)
                assert [e.rank for e in examples] == sorted(e.rank for e in examples)


def test_nothing_of_the_test_artist_is_in_it(embedded):
    samples = json.loads((EMBEDDED_BUNDLE / SAMPLES).read_text())
    assert samples
    assert not any("openmoji" in json.dumps(sample) for sample in samples)
    assert not any("openmoji" in licence.source for licence in embedded.manifest.licences)


def test_its_towers_find_the_captions_of_drawings_they_never_saw(embedded):
    samples = json.loads((EMBEDDED_BUNDLE / SAMPLES).read_text())
    captions = [sample["caption"] for sample in samples]
    towers = load_towers(embedded, "torch")
    pixels = load_pixels(
        [(EMBEDDED_BUNDLE / sample["path"]).read_bytes() for sample in samples],
        ImagePreprocess(embedded.clip_config),
    )
    images = towers.encode_images(pixels).unit
    texts = towers.encode_texts(Tokenizer(embedded.clip_config).tokenize(captions, True)).unit
    right = int(((images @ texts.T).argmax(1) == np.arange(len(samples))).sum())
    # By chance each of 24 is right with p = 1/24; six or more then happen with p < 0.001.
    assert right >= 6
