from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from services.bundle.load import CLIP_CONFIG, CLIP_WEIGHTS, Bundle
from training.build.assemble import check_replaceable
from training.build.errors import BuildError
from training.build.pipeline import pipeline_entry
from training.build.towers import fetch_towers
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def clip(tiny: Bundle, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(tiny.path / CLIP_CONFIG, folder / CONFIG_FILE)
    shutil.copyfile(tiny.path / CLIP_WEIGHTS, folder / WEIGHTS_FILE)
    return folder


def test_a_folder_is_taken_with_the_fingerprint_of_its_bundle(
    tiny: Bundle, clip: Path, tmp_path: Path
) -> None:
    assert fetch_towers(str(clip), "", None, tmp_path / "out") == tiny.manifest.clip.fingerprint
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (tiny.path / CLIP_WEIGHTS).read_bytes()


def test_weights_are_replaced_when_the_model_changed(clip: Path, tmp_path: Path) -> None:
    first = fetch_towers(str(clip), "", None, tmp_path / "out")
    (tmp_path / "out" / WEIGHTS_FILE).write_bytes(b"half a copy")
    assert fetch_towers(str(clip), "", None, tmp_path / "out") == first


def test_a_hub_repository_gives_safetensors_only(
    clip: Path, tmp_path: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clip / WEIGHTS_FILE).rename(clip / "model.safetensors")
    asked = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        if not (clip / name).exists():
            raise EntryNotFoundError(f"no {name}")
        return str(clip / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = fetch_towers("hf-hub:someone/clip", "", "abc", tmp_path / "out")
    assert found == tiny.manifest.clip.fingerprint
    assert asked[-1] == ("someone/clip", "model.safetensors", "abc")
    (clip / "model.safetensors").rename(clip / "open_clip_pytorch_model.bin")
    with pytest.raises(BuildError, match="pickled weights are not read"):
        fetch_towers("hf-hub:someone/clip", "", "abc", tmp_path / "out")


def test_a_tag_says_which_activation_its_weights_were_trained_with(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(clip / WEIGHTS_FILE))
    configs = {}
    for tag in ("openai", "laion2b_s34b_b79k"):
        fetch_towers("ViT-B-32", tag, None, tmp_path / tag)
        configs[tag] = json.loads((tmp_path / tag / CONFIG_FILE).read_text())["model_cfg"]["quick_gelu"]
    assert configs == {"openai": True, "laion2b_s34b_b79k": False}


@pytest.mark.parametrize(
    ("model", "tag", "why"),
    [
        ("nowhere", "", "no such folder"),
        ("ViT-B-32", "nothing", "has no weights 'nothing'"),
        ("NoSuchModel", "openai", "has no model"),
    ],
)
def test_a_model_that_is_not_there_is_told(model: str, tag: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=why):
        fetch_towers(model, tag, None, tmp_path / "out")


def test_a_folder_that_is_no_bundle_is_not_replaced(tiny: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildError, match="is not a bundle"):
        check_replaceable(tmp_path)
    check_replaceable(tiny.path)
    check_replaceable(tmp_path / "new")


def pipeline(folder: Path, kind: str, **entry: object) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (folder / "unet" / "config.json").write_text(json.dumps({"sample_size": 64}))
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1, 2, 3, 4]}))
    if entry:
        (folder / "monofacet.json").write_text(json.dumps(entry))
    return folder


def test_a_stock_pipeline_is_read_off_its_folder(tmp_path: Path) -> None:
    entry = pipeline_entry(pipeline(tmp_path / "sd", "StableDiffusionPipeline"), "f" * 64)
    assert (entry.height, entry.width, entry.conditioning) == (512, 512, "prompt")
    assert entry.tower_fingerprint == "f" * 64


def test_a_pipeline_of_other_towers_is_refused(tmp_path: Path) -> None:
    said = {
        "pipeline": "StableUnCLIPImg2ImgPipeline",
        "conditioning": "embedding",
        "tower_fingerprint": "a" * 64,
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    folder = pipeline(tmp_path / "unclip", "StableUnCLIPImg2ImgPipeline", **said)
    with pytest.raises(BuildError, match="could not be steered"):
        pipeline_entry(folder, "f" * 64)
    assert pipeline_entry(folder, "a" * 64).height == 64


@pytest.mark.parametrize("kind", ["StableUnCLIPImg2ImgPipeline", "FluxPipeline"])
def test_a_pipeline_that_does_not_say_its_towers_or_is_not_served_is_refused(
    kind: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError):
        pipeline_entry(pipeline(tmp_path / "it", kind), "f" * 64)
