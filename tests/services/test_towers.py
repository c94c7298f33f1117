"""Backends against open_clip itself, and results against batch size and neighbours.

Measured, as the largest difference of a coordinate of a unit embedding. The embedded CLIP: torch f32 9e-8 between
batch sizes, OpenVINO f32 0 between batch sizes and 2e-7 from torch. The tiny ViT with its large random weights: torch
5e-7 between batch sizes and from open_clip, OpenVINO 2e-6 from torch. The tolerances are four times the latter.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.bundle.towers import load_towers
from services.encoding.clip import build_clip, read_clip_config
from services.encoding.load import choose_backend
from services.encoding.openvino_backend import OpenVINOTowers, best_precision, ov
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.encoding.towers import Embeddings, chunk_sizes, text_length
from services.errors import ManifestError, UnsupportedModel
from tests.support.tiny_bundle import MODEL, PREPROCESS

NEIGHBOUR_TOLERANCE = 2e-6
BACKEND_TOLERANCE = 1e-5

TEXTS = ["cat", "a red circle on a white ground", "!", "a" + " very" * 11 + " long cat", "", "two dogs!!!"]

VARIANTS = {
    "vit": MODEL,
    "quick-gelu": {**MODEL, "quick_gelu": True},
    "custom-text": {**MODEL, "custom_text": True},
    "regnet": {
        **MODEL,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "regnetx_002",
            "timm_model_pretrained": True,  # must be overruled: nothing is downloaded
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
    },
    "not-causal": {
        **MODEL,
        "custom_text": True,
        "text_cfg": {**MODEL["text_cfg"], "no_causal_mask": True},
    },
}


def make_model(tmp_path, variant: str):
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": VARIANTS[variant], "preprocess_cfg": PREPROCESS}))
    config = read_clip_config(path)
    torch.manual_seed(0)
    return config, build_clip(config, None)


def make_towers(backend: str, model, config):
    if backend == "torch":
        return TorchTowers(model, config, threads=1)
    return OpenVINOTowers(model, config, threads=1, precision="f32")


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 3, 32, 32)).astype(np.float32)


# Converting takes OpenVINO seconds, so it meets the layouts that differ in what it must convert.
@pytest.mark.parametrize(
    ("variant", "backend"),
    [*((variant, "torch") for variant in VARIANTS), ("vit", "openvino"), ("regnet", "openvino")],
)
def test_embeddings_are_open_clips_whatever_the_batch(tmp_path, backend, variant):
    config, model = make_model(tmp_path, variant)
    images, tokens = pixels(13), Tokenizer(config).tokenize(TEXTS)
    with torch.inference_mode():
        expected_images = model.encode_image(torch.from_numpy(images)).numpy()
        expected_texts = model.encode_text(torch.from_numpy(tokens)).numpy()
    towers = make_towers(backend, model, config)
    for batch, expected, encode in (
        (images, expected_images, towers.encode_images),
        (tokens, expected_texts, towers.encode_texts),
    ):
        embedded = encode(batch)
        norm = np.linalg.norm(expected, axis=1)
        np.testing.assert_allclose(embedded.norm, norm, rtol=BACKEND_TOLERANCE)
        np.testing.assert_allclose(embedded.unit, expected / norm[:, None], atol=BACKEND_TOLERANCE)
        alone = np.concatenate([encode(batch[i : i + 1]).unit for i in range(len(batch))])
        np.testing.assert_allclose(embedded.unit, alone, atol=NEIGHBOUR_TOLERANCE)
        shuffled = np.random.default_rng(1).permutation(len(batch))
        np.testing.assert_allclose(
            encode(batch[shuffled]).unit, embedded.unit[shuffled], atol=NEIGHBOUR_TOLERANCE
        )


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_towers_say_what_they_are_warm_up_and_repeat_themselves(tiny, backend):
    towers = load_towers(tiny, backend, device="cpu", threads=1)
    towers.warm_up(max_batch=4)
    batch = pixels(7)
    assert np.array_equal(towers.encode_images(batch).unit, towers.encode_images(batch).unit)
    assert (towers.backend, towers.embed_dim, towers.image_size) == (backend, 16, (32, 32))
    assert towers.context_length == 16
    assert towers.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)  # open_clip's start, kept as a half float
    towers.close()


def test_pure_bf16_is_close_to_f32(tiny):
    model = build_clip(tiny.clip_config, tiny.clip_weights)
    full = TorchTowers(model, tiny.clip_config).encode_images(pixels(8)).unit
    half = TorchTowers(model, tiny.clip_config, precision="bf16").encode_images(pixels(8)).unit
    # Measured: 0.994. bf16 keeps 8 bits, and these random weights are large; a wrong layout would be near 0.
    assert (full * half).sum(1).min() > 0.98


def test_auto_takes_openvino_on_a_cpu_and_torch_on_a_gpu():
    assert choose_backend("cpu") == "openvino"
    assert choose_backend("cuda:0") == "torch"


def test_openvino_does_not_report_its_use():
    code = (
        "import services.encoding.openvino_backend\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "assert telemetry_utils.tm.__name__.endswith('telemetry_stub'), telemetry_utils.tm"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [(["FP32", "INT8", "BIN"], "f32"), (["BF16", "FP32", "FP16", "INT8"], "bf16")],
    ids=["AVX2", "AMX"],
)
def test_bf16_is_only_chosen_where_the_cpu_has_it(capabilities, expected):
    core = SimpleNamespace(get_property=lambda device, name: capabilities)
    assert best_precision(core) == expected
    assert best_precision(ov.Core()) in ("f32", "bf16")


@pytest.mark.skipif(best_precision(ov.Core()) == "f32", reason="this processor has no bf16 for OpenVINO")
def test_openvinos_bf16_is_close_to_f32(tiny):
    full, half = (
        load_towers(tiny, "openvino", device="cpu", threads=1, precision=precision)
        .encode_images(pixels(8))
        .unit
        for precision in ("f32", "bf16")
    )
    # As torch's bf16 above.
    assert (full * half).sum(1).min() > 0.98


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("tensorflow", {}),
        ("torch", {"precision": "f8"}),
        ("openvino", {"precision": "f16"}),
        ("openvino", {"device": "cuda"}),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, backend, options):
    with pytest.raises(UnsupportedModel):
        load_towers(tiny, backend, **{"device": "cpu", **options})


@pytest.mark.parametrize(
    "change",
    [
        {"text_cfg": {**MODEL["text_cfg"], "hf_model_name": "roberta-base"}},
        {"text_cfg": {**MODEL["text_cfg"], "hf_tokenizer_name": "t5"}},
        {"text_cfg": {**MODEL["text_cfg"], "vocab_size": 32000}},
        {"multimodal_cfg": {"width": 8}},
    ],
)
def test_models_these_towers_cannot_run_are_refused(tmp_path, change):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_cfg": {**MODEL, **change}, "preprocess_cfg": {}}))
    with pytest.raises(UnsupportedModel):
        read_clip_config(path)


def test_weights_that_do_not_fit_are_refused_by_name(tiny, tmp_path):
    state = safetensors.torch.load_file(str(tiny.clip_weights))
    del state["ln_final.weight"]
    safetensors.torch.save_file(state, str(tmp_path / "model.safetensors"))
    with pytest.raises(ManifestError, match=r"ln_final\.weight"):
        build_clip(tiny.clip_config, tmp_path / "model.safetensors")


def test_a_config_says_everything_the_preprocessing_needs(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_cfg": {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "image_size": 224}},
                "preprocess_cfg": {"mean": 0.5, "std": [0.2, 0.3, 0.4], "resize_mode": "squash"},
            }
        )
    )
    config = read_clip_config(path)
    assert dataclasses.asdict(config) | {"model_cfg": 0, "preprocess_cfg": 0} == {
        "model_cfg": 0,
        "preprocess_cfg": 0,
        "embed_dim": 16,
        "image_size": (224, 224),
        "context_length": 16,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
    }


@given(batch=st.integers(0, 300), largest=st.sampled_from([1, 8, 32]))
def test_chunks_are_powers_of_two_that_add_up(batch, largest):
    sizes = chunk_sizes(batch, largest)
    assert sum(sizes) == batch
    assert all(size <= largest and size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)


@given(end=st.integers(0, 76))
def test_a_text_runs_at_a_length_that_holds_its_end(end):
    tokens = np.zeros((1, 77), np.int64)
    tokens[0, end] = 49407
    length = int(text_length(tokens, 77)[0])
    assert end < length <= 77
    assert length == 77 or length & (length - 1) == 0


def test_norms_and_directions_recompose_the_embedding():
    raw = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32) * 100
    split = Embeddings.of(raw)
    # float32 keeps 24 bits, 6e-8 a step.
    np.testing.assert_allclose(split.unit * split.norm[:, None], raw, rtol=1e-6)


def test_a_zero_embedding_is_not_nan():
    assert not np.isnan(Embeddings.of(np.zeros((1, 4), np.float32)).unit).any()
