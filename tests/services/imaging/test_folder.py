"""Pipelines as people find them: half downloaded, of one variant, with adapters beside, and leading elsewhere."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from services.bundle.manifest import DiffusionEntry
from services.errors import BundleError, BundleFileError, UnsafeWeights, UnsupportedModel
from services.imaging.folder import adapters, check_configs, weights_variant
from services.imaging.pipeline import load_parts
from tests.services.imaging.conftest import Load

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 605247071\n"
UNET = "diffusion_pytorch_model"


@pytest.fixture
def pipeline(load_kind: Load, tmp_path: Path) -> tuple[Path, DiffusionEntry]:
    bundle, _ = load_kind("sd1")
    assert bundle.manifest.diffusion is not None
    return Path(shutil.copytree(bundle.path / "diffusion", tmp_path / "sd")), bundle.manifest.diffusion


def halve(folder: Path) -> None:
    """Leave what `save_pretrained(variant="fp16")` writes."""
    for path in list(folder.rglob("*.safetensors")):
        state = {k: v.half() for k, v in safetensors.torch.load_file(str(path)).items()}
        safetensors.torch.save_file(state, str(path.with_suffix(".fp16.safetensors")), {"format": "pt"})
        path.unlink()


def test_a_folder_of_half_floats_alone_is_loaded(pipeline: tuple[Path, DiffusionEntry]) -> None:
    folder, entry = pipeline
    whole = load_parts(folder, entry)
    halve(folder)
    parts = load_parts(folder, entry)
    for part in ("unet", "vae", "text_encoder"):
        expected = dict(getattr(whole, part).named_parameters())
        for name, value in getattr(parts, part).named_parameters():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name].half().float()), name


def test_the_usual_weights_are_taken_where_both_are_there(pipeline: tuple[Path, DiffusionEntry]) -> None:
    folder, entry = pipeline
    for path in list(folder.rglob("*.safetensors")):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    assert weights_variant(folder / "unet") is None
    load_parts(folder, entry)


def test_shards_are_loaded_and_a_missing_one_is_named(pipeline: tuple[Path, DiffusionEntry]) -> None:
    from diffusers import UNet2DConditionModel

    folder, entry = pipeline
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    parts = load_parts(folder, entry)
    assert all(torch.equal(a, b) for a, b in zip(parts.unet.parameters(), unet.parameters(), strict=True))
    gone = sorted((folder / "unet").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BundleFileError, match=f"names {gone.name}, which is not there: the download"):
        load_parts(folder, entry)


def write_index(folder: Path, file: str) -> None:
    document = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": file}}
    (folder / "unet" / f"{UNET}.safetensors.index.json").write_text(json.dumps(document))


def pickled(folder: Path) -> None:
    path = folder / "vae" / f"{UNET}.safetensors"
    path.rename(path.with_suffix(".bin"))


def named_otherwise(folder: Path) -> None:
    path = folder / "vae" / f"{UNET}.safetensors"
    path.rename(path.with_name("my.vae.v2.safetensors"))


def cut(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "unet" / f"{UNET}.safetensors").write_text(LFS), BundleFileError,
         rf"^unet/{UNET}\.safetensors is a Git LFS pointer"),
        (cut, BundleFileError, r"^text_encoder/model\.safetensors is damaged or cut off"),
        (lambda f: write_index(f, f"{UNET}-00001-of-00002.safetensors"), BundleFileError,
         rf"unet/{UNET}\.safetensors\.index\.json names .* delete the index to load {UNET}\.safetensors"),
        (lambda f: write_index(f, "../../elsewhere.safetensors"), BundleFileError, "leads elsewhere"),
        (pickled, UnsafeWeights, "vae: weights must be safetensors"),
        (named_otherwise, BundleFileError, r"vae has no diffusion_pytorch_model\.safetensors .* but my\.vae"),
    ],
    ids=["pointer", "cut", "stale index", "index that leads out", "pickle", "another name"],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named_by_its_file(
    damage: Callable[[Path], object],
    kind: type[BundleError],
    message: str,
    pipeline: tuple[Path, DiffusionEntry],
) -> None:
    folder, entry = pipeline
    damage(folder)
    with pytest.raises(kind, match=message) as raised:
        load_parts(folder, entry)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer/tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_file": "../../tokenizer.json"}),
        (
            "tokenizer/tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["owner/name--code.Tokenizer", None]}},
        ),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "owner/name--code.Model"}}),
        ("unet/config.json", {"quantization_config": {"quant_method": "gptq"}}),
        ("text_encoder/adapter_config.json", {"base_model_name_or_path": "owner/name"}),
    ],
)
def test_a_config_that_loads_what_is_not_in_the_folder_is_refused_without_reaching_for_it(
    file: str, change: dict[str, Any], pipeline: tuple[Path, DiffusionEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entry = pipeline
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, **change}))
    reached: list[object] = []

    def refuse(*arguments: object, **more: object) -> None:
        reached.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UnsupportedModel, match=file.rpartition("/")[2]):
        load_parts(folder, entry)
    assert reached == []


def test_configs_of_a_whole_pipeline_pass_and_reach_for_nothing(
    pipeline: tuple[Path, DiffusionEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entry = pipeline
    check_configs(folder)
    reached: list[object] = []

    def refuse(*arguments: object, **more: object) -> None:
        reached.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_parts(folder, entry)
    assert reached == []


def test_an_adapter_beside_the_weights_is_found(pipeline: tuple[Path, DiffusionEntry]) -> None:
    folder, _ = pipeline
    assert adapters(folder) == []
    state = {"unet.x.lora.up.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(state, str(folder / "pytorch_lora_weights.safetensors"))
    kohya = {"lora_unet_down.lora_down.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(kohya, str(folder / "unet" / "style.safetensors"))
    assert adapters(folder) == ["pytorch_lora_weights.safetensors", "unet/style.safetensors"]
