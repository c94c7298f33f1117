"""The attacked sample of demonstrations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from services.bundle.load import Bundle, refresh_manifest
from services.encoding.images import ImagePreprocess, decode_image
from training.defense.redteam import embed_texts
from training.defense.sample import LEVELS, attack_samples, write_attacked
from training.defense.victim import Victim, to_images


def test_the_attacked_sample_is_within_its_budget_and_nearer_to_its_target(
    tiny: Bundle, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "bundle"))
    write_attacked(path)
    bundle = Bundle.load(path)
    told = json.loads((path / "samples" / "attacked.json").read_text())
    captions = {sample.path: sample.caption for sample in bundle.manifest.samples}
    assert told["target"] in captions.values() and told["target"] != captions[told["sample"]]
    attacked = np.asarray(Image.open(path / told["path"]))
    clean = np.asarray(
        ImagePreprocess(bundle.clip_config).fit(decode_image((path / told["sample"]).read_bytes()))
    )
    difference = np.abs(attacked.astype(int) - clean)
    assert 0 < difference.max() <= told["levels"] == LEVELS
    units = Victim(bundle).embed(to_images(np.stack([clean, attacked])))
    before, after = (units @ embed_texts(bundle, (told["target"],)).T)[:, 0]
    assert after > before


def test_the_same_samples_give_the_same_picture(tiny: Bundle) -> None:
    samples = list({sample.caption: sample for sample in tiny.manifest.samples}.values())
    first, again = (attack_samples(tiny, samples) for _ in range(2))
    assert first[:2] == again[:2]
    np.testing.assert_array_equal(first[2], again[2])


def test_a_bundle_with_fewer_than_two_samples_is_left_as_it_is(tiny: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "bundle"))
    (path / "samples" / "samples.json").write_text("[]")
    refresh_manifest(path)
    manifest = (path / "manifest.json").read_bytes()
    write_attacked(path)
    assert (path / "manifest.json").read_bytes() == manifest
