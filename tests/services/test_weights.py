"""Files that lie in the place of weights: each is told in one line that names it and the likely cause."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from services.bundle.load import CLIP_CONFIG, Bundle
from services.bundle.selfcheck import read_selfcheck
from services.dictionaries import load_dictionary
from services.dictionaries.saelens import CONFIG, WEIGHTS, read_saelens
from services.encoding.clip import (
    ClipConfig,
    build_clip,
    read_clip_config,
    read_logit_scale,
    tower_fingerprint,
)
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.errors import BundleError, BundleFileError, ManifestError, UnsupportedModel
from services.imaging.statistics import ActivationStatistics
from services.weights import load_weights, misfit, open_weights

HEADER = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
WHOLE = struct.pack("<Q", len(HEADER)) + HEADER + bytes(16)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 605247071\n"
FOUND = {
    "lfs": (LFS, "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "answer": (b'{"error": "Invalid credentials in Authorization header"}', "JSON"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(4096), "holds zeros"),
    "cut in the data": (WHOLE[:-6], "cut off after"),
    "cut in the header": (WHOLE[:40], "cut off after"),
    "zip of PyTorch": (b"PK\x03\x04" + bytes(100), "pickle"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "noise": (b"\xff" * 100, "is not safetensors"),
    "sizes that overflow": (
        struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'
        + bytes(16), "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "cause"), FOUND.values(), ids=FOUND)
def test_what_is_no_safetensors_is_told_by_name_and_cause(data: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "unet" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(BundleFileError, match=cause) as raised:
        load_weights(path)
    message = str(raised.value)
    assert message.startswith("unet/model.safetensors ")
    assert "\n" not in message and len(message) < 300
    assert str(tmp_path) not in message


def test_weights_that_are_not_there_and_tensors_that_are_not_in_them(tmp_path: Path) -> None:
    with pytest.raises(BundleFileError, match=r"is not there$"):
        load_weights(tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, str(path))
    with pytest.raises(BundleFileError, match=r"model\.safetensors"), open_weights(path) as file:
        file.get_tensor("b")
    # numpy has no bfloat16.
    with pytest.raises(BundleFileError, match="bfloat16"):
        load_weights(path)
    assert load_weights(path, "pt")["a"].dtype == torch.bfloat16


def readers(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads weights, each given a pointer of git-lfs."""
    from services.bias.calibration import BiasCalibration
    from services.defense.calibration import DefenseCalibration

    path = tmp_path / WEIGHTS
    path.write_bytes(LFS)
    (tmp_path / CONFIG).write_text(json.dumps({"d_in": 2, "d_sae": 2}))
    document = {"embed_dim": 4, "n_features": 8, "k": 2}
    (tmp_path / "sae.json").write_text(
        json.dumps(
            {
                **{key: document[key] for key in ("embed_dim", "n_features")},
                "kind": "sae", "tower_fingerprint": "", "training": {}, "config": document,
            }
        )
    )  # fmt: skip
    (tmp_path / "sae.safetensors").write_bytes(LFS)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {}}))
    return {
        "fingerprint": lambda: tower_fingerprint(config, path),
        "logit scale": lambda: read_logit_scale(path),
        "dictionary": lambda: load_dictionary(tmp_path, "sae"),
        "SAELens": lambda: read_saelens(tmp_path),
        "probe": lambda: read_selfcheck(path),
        "statistics": lambda: ActivationStatistics.read(path),
        "bias": lambda: BiasCalibration.read(config, path),
        "defence": lambda: DefenseCalibration.read(config, path),
    }


@pytest.mark.parametrize(
    "reader",
    ["fingerprint", "logit scale", "dictionary", "SAELens", "probe", "statistics", "bias", "defence"],
)
def test_every_reader_of_weights_names_the_pointer(reader: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"safetensors is a Git LFS pointer"):
        readers(tmp_path)[reader]()


def test_weights_that_do_not_fit_are_told_in_a_few_names() -> None:
    expected = {f"layer.{i}.weight": (4, 4) for i in range(100)}
    assert misfit(expected, expected) == ""
    found = {**dict.fromkeys(list(expected)[:50], (4, 4)), "layer.0.weight": (2, 4), "more": (1,)}
    problem = misfit(expected, found)
    assert "and 47 more" in problem
    assert "unknown: more" in problem and "of another shape: layer.0.weight [2, 4], not [4, 4]" in problem
    assert len(problem) < 250


@pytest.fixture
def clip(tiny: Bundle, tmp_path: Path) -> Callable[..., ClipConfig]:
    """Write the tiny bundle's config with changes, and read it."""

    def write(change: Callable[[dict[str, Any]], None] = lambda config: None) -> ClipConfig:
        document = json.loads((tiny.path / CLIP_CONFIG).read_text())
        change(document["model_cfg"])
        path = tmp_path / "open_clip_config.json"
        path.write_text(json.dumps(document))
        return read_clip_config(path)

    return write


def unit_texts(config: ClipConfig, weights: Path) -> torch.Tensor:
    towers = TorchTowers(build_clip(config, weights), config)
    return torch.from_numpy(towers.encode_texts(Tokenizer(config).tokenize(["a red circle", "two"])).unit)


def test_the_forms_of_weights_that_open_clip_takes_give_the_same_embeddings(
    tiny: Bundle, clip: Callable[..., ClipConfig], tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(str(tiny.clip_weights))
    expected = unit_texts(clip(), tiny.clip_weights)
    path = tmp_path / "open_clip_model.safetensors"
    # Of DistributedDataParallel; of a scale saved as a list; with a buffer that is saved no more.
    for changed in (
        {f"module.{name}": tensor for name, tensor in state.items()},
        {**state, "logit_scale": state["logit_scale"].reshape(1)},
        {**state, "position_ids": torch.arange(16)},
    ):
        safetensors.torch.save_file({k: v.contiguous() for k, v in changed.items()}, str(path))
        assert torch.equal(unit_texts(clip(), path), expected)
        assert read_logit_scale(path) == read_logit_scale(tiny.clip_weights)
    # The config says two towers, and the weights are in the layout that has the text tower on the model itself.
    custom = clip(lambda model: model.update(custom_text=True))
    torch.testing.assert_close(unit_texts(custom, tiny.clip_weights), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "bpe_path is not supported"),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"}}, "bpe_path is not supported"),
        ("text_cfg", {"tokenizer_kwargs": {"additional_special_tokens": ["(a+)+"]}}, "additional_special"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "/etc"}}, "clean must be one of"),
        ("text_cfg", {"hf_tokenizer_name": "a/b"}, "hf_tokenizer_name"),
        ("text_cfg", {"hf_model_name": "a/b"}, "hf_model_name"),
        ("text_cfg", {"tokenizer_mode": "clips"}, "tokenizer_mode"),
        ("vision_cfg", {"timm_model_name": "hf-hub:a/b"}, "not the name of an architecture"),
        ("vision_cfg", {"timm_model_name": "hf_hub:a/b"}, "not the name of an architecture"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/x"}, "not the name of an architecture"),
        ("vision_cfg", {"timm_model_name": "../x"}, "not the name of an architecture"),
        ("vision_cfg", {"layers": 10**6}, "out of all proportion"),
        ("vision_cfg", {"width": 10**9}, "out of all proportion"),
        ("text_cfg", {"context_length": 10**8}, "out of all proportion"),
    ],
)
def test_a_config_that_reaches_out_of_the_bundle_or_out_of_proportion_is_refused(
    section: str, change: dict[str, Any], message: str, clip: Callable[..., ClipConfig]
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        clip(lambda model: model[section].update(change))


@pytest.mark.parametrize(
    "value", [[], {"model_cfg": []}, {"model_cfg": {"vision_cfg": 1, "text_cfg": [], "embed_dim": 1}}]
)
def test_a_config_of_another_form_is_refused_in_one_line(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ManifestError, match="is not an open_clip config"):
        read_clip_config(path)


def test_a_config_whose_sizes_the_weights_do_not_bear_out_takes_no_memory(
    tiny: Bundle, clip: Callable[..., ClipConfig]
) -> None:
    # 200 blocks of 400,000: a million gigabytes, were they made.
    huge = clip(lambda model: model["vision_cfg"].update(width=400_000, layers=200))
    with pytest.raises(ManifestError, match=r"open_clip_model\.safetensors does not fit its config: missing"):
        build_clip(huge, tiny.clip_weights)


def test_a_dictionary_whose_sizes_the_weights_do_not_bear_out_takes_no_memory(copied: Path) -> None:
    path = copied / "dictionaries" / "sae.json"
    document = json.loads(path.read_text())
    document["config"]["n_features"] = 10**9
    path.write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="does not fit its config: of another shape"):
        load_dictionary(path.parent, "sae")


def test_no_config_reaches_for_the_network(
    tiny: Bundle, clip: Callable[..., ClipConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def refuse(*arguments: object, **more: object) -> None:
        reached.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    def pretrained(model: dict[str, Any]) -> None:
        model["vision_cfg"] = {
            "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True, "image_size": 32,
        }  # fmt: skip

    assert build_clip(clip(pretrained), None) is not None
    build_clip(clip(), tiny.clip_weights)
    assert reached == []
