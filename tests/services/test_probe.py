"""A tower that is used in another way than it was made for is refused, whichever way it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from services.bundle.load import CLIP_CONFIG, CLIP_WEIGHTS, SELFCHECK, Bundle, refresh_manifest
from services.bundle.manifest import manifest_sha256
from services.bundle.selfcheck import check_bundle, read_selfcheck, write_selfcheck
from services.bundle.towers import load_towers
from services.encoding.clip import build_clip, read_clip_config
from services.encoding.images import ImagePreprocess
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.errors import BundleFileError, SelfCheckMismatch
from training.build.assemble import copy_towers
from training.build.selfcheck import PROBE_FILE, probe_of_folder
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def probed(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a probe by open_clip's own code."""
    path = Path(shutil.copytree(tiny.path, tmp_path_factory.mktemp("probed") / "tiny"))
    write_selfcheck(path / SELFCHECK, probe_of_folder((path / CLIP_CONFIG).parent))
    refresh_manifest(path)
    return Bundle.load(path)


def check(probed: Bundle, change: Change = lambda _: None, **options: Any) -> None:
    """Check the probe against towers, preprocessing and tokenizer of a changed config."""
    document = json.loads((probed.path / CLIP_CONFIG).read_text())
    change(document)
    changed = probed.path.parent / "changed.json"
    changed.write_text(json.dumps(document))
    config = read_clip_config(changed)
    towers = options.get("towers") or TorchTowers(build_clip(config, probed.clip_weights), config)
    assert check_bundle(probed, ImagePreprocess(config), Tokenizer(config), towers)


def test_the_service_answers_as_open_clip_itself_does(probed: Bundle) -> None:
    check(probed)
    check(probed, towers=load_towers(probed, "openvino", threads=1, precision="f32"))
    check(probed, towers=load_towers(probed, "torch", threads=1, precision="bf16"))


def gelu(document: dict[str, Any]) -> None:
    document["model_cfg"]["quick_gelu"] = True


def other_mean(document: dict[str, Any]) -> None:
    # ImageNet's instead of CLIP's: every value within 0.04.
    document["preprocess_cfg"] |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def other_resize(document: dict[str, Any]) -> None:
    document["preprocess_cfg"]["interpolation"] = "bilinear"


def squashed(document: dict[str, Any]) -> None:
    document["preprocess_cfg"]["resize_mode"] = "squash"


def other_size(document: dict[str, Any]) -> None:
    # A patch of 4 on 16 pixels has the positions of a patch of 8 on 32.
    document["model_cfg"]["vision_cfg"]["image_size"] = 16


def cleaned(document: dict[str, Any]) -> None:
    document["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (gelu, "image tower"),
        (other_mean, "preprocessing"),
        (other_resize, "preprocessing"),
        (squashed, "preprocessing"),
        (cleaned, "tokenizer"),
    ],
)
def test_a_model_under_another_configuration_is_refused_and_the_stage_named(
    probed: Bundle, change: Change, stage: str
) -> None:
    with pytest.raises(SelfCheckMismatch, match=f"the {stage} ") as caught:
        check(probed, change)
    assert [violation[:2] for violation in caught.value.violations] == [("probe", stage)]


def test_a_context_of_another_length_is_refused(probed: Bundle) -> None:
    config = dataclasses.replace(probed.clip_config, context_length=12)
    towers = TorchTowers(build_clip(probed.clip_config, probed.clip_weights), probed.clip_config)
    with pytest.raises(SelfCheckMismatch, match="context of 12 tokens; the towers were recorded with 16"):
        check_bundle(probed, ImagePreprocess(config), Tokenizer(config), towers)


def test_weights_that_are_not_a_number_are_refused(probed: Bundle) -> None:
    model = build_clip(probed.clip_config, probed.clip_weights)
    with torch.no_grad():
        model.visual.proj[0, 0] = float("nan")
    with pytest.raises(SelfCheckMismatch, match="image tower"):
        check(probed, towers=TorchTowers(model, probed.clip_config))


def test_a_folder_is_held_to_the_probe_that_it_brings(probed: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    document = json.loads((probed.path / CLIP_CONFIG).read_text())
    shutil.copyfile(probed.path / CLIP_WEIGHTS, source / WEIGHTS_FILE)
    shutil.copyfile(probed.path / SELFCHECK, source / PROBE_FILE)
    for quick in (False, True):
        document["model_cfg"]["quick_gelu"] = quick
        (source / CONFIG_FILE).write_text(json.dumps(document))
        if quick:
            with pytest.raises(SelfCheckMismatch):
                copy_towers(source, tmp_path / "bundle")
        else:
            copy_towers(source, tmp_path / "bundle")
            assert (tmp_path / "bundle" / SELFCHECK).exists()


def test_a_probe_comes_back_as_it_was_written_and_nothing_else_is_taken_for_one(
    probed: Bundle, tmp_path: Path
) -> None:
    probe = read_selfcheck(probed.path / SELFCHECK)
    write_selfcheck(tmp_path / "again.safetensors", probe)
    assert (tmp_path / "again.safetensors").read_bytes() == (probed.path / SELFCHECK).read_bytes()
    safetensors.torch.save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    for name, why in (("other.safetensors", "not a self-check"), ("gone.safetensors", "is not there")):
        with pytest.raises(BundleFileError, match=why):
            read_selfcheck(tmp_path / name)


def test_a_bundle_without_a_probe_is_served_and_keeps_its_id(tiny: Bundle) -> None:
    assert tiny.manifest.probe is None
    config = tiny.clip_config
    towers = TorchTowers(build_clip(config, tiny.clip_weights), config)
    assert not check_bundle(tiny, ImagePreprocess(config), Tokenizer(config), towers)
    with_probe = dataclasses.replace(tiny.manifest, probe="clip/probe.safetensors")
    assert manifest_sha256(tiny.manifest) == tiny.sha256 != manifest_sha256(with_probe)
