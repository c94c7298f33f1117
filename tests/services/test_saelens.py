"""Dictionaries in SAELens's format: what comes back, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from services.dictionaries import NCL, SAE, Dictionary, Modality, SAEPair
from services.dictionaries.saelens import CONFIG, WEIGHTS, read_saelens, write_saelens
from services.errors import UnsupportedModel

D, N, K = 12, 40, 5


def randomised(dictionary: Dictionary) -> Any:
    with torch.no_grad():
        for name, value in dictionary.state_dict().items():
            value.copy_(torch.randn_like(value) * (0.1 if "bias" in name else 0.5))
            if name.endswith("threshold"):
                value.copy_(value.abs())
    return dictionary.eval()


def units(seed: int = 0) -> torch.Tensor:
    e = torch.from_numpy(np.random.default_rng(seed).standard_normal((64, D)).astype(np.float32))
    return torch.nn.functional.normalize(e, dim=-1)


@pytest.mark.parametrize(
    "dictionary",
    [
        SAE(D, N, K),
        SAE(D, N, K, "batch-topk"),
        SAE(D, N, N, "jump-relu"),
        SAEPair(D, N, K),
        SAEPair(D, N, K, "batch-topk"),
    ],
    ids=["topk", "batch-topk", "jump-relu", "pair", "pair-batch-topk"],
)
@torch.no_grad()
def test_a_dictionary_comes_back_with_the_same_codes(dictionary: Any, tmp_path: Path) -> None:
    randomised(dictionary)
    write_saelens(dictionary, tmp_path)
    back = read_saelens(tmp_path)
    assert isinstance(back, SAEPair) == isinstance(dictionary, SAEPair)
    for modality in Modality:
        z = dictionary.encode(units(), modality)
        assert 0 < (z > 0).sum() < z.numel()
        # The same float32 weights in the same products.
        torch.testing.assert_close(back.encode(units(), modality), z, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            back.decode(z, modality), dictionary.decode(z, modality), atol=1e-6, rtol=0
        )
        rows = dictionary.decoder_rows(modality)
        assert torch.equal(back.decoder_rows(modality), rows)


def write(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"d_in": D, "d_sae": N, **config}))
    safetensors.torch.save_file(tensors, str(folder / WEIGHTS))
    return folder


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {"W_enc": normal(D, N), "b_enc": normal(N) / 4, "W_dec": normal(N, D), "b_dec": normal(D) / 4}


def reference(
    x: torch.Tensor, config: dict[str, Any], w: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode and decode as the format's own documentation says, in float64."""
    w = {name: value.double() for name, value in w.items()}
    x = x.double()
    factor = math.sqrt(D) / x.norm(dim=-1, keepdim=True)
    if config.get("normalize_activations") != "constant_norm_rescale":
        factor = torch.ones_like(factor)
    inner = x * factor - (w["b_dec"] if config.get("apply_b_dec_to_input", True) else 0)
    pre = inner @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(N).double()
    scaled = pre * norms
    if config["architecture"] == "topk":
        top = scaled.topk(config["k"], dim=-1)
        z = torch.zeros_like(scaled).scatter(-1, top.indices, top.values.relu())
    else:
        threshold = w.get("threshold", w.get("log_threshold", torch.zeros(N).double() - torch.inf))
        if "log_threshold" in w:
            threshold = threshold.exp()
        # SAELens learns topk_threshold on what was scaled, and saves it as the threshold of weights that are.
        threshold = w.get("topk_threshold", threshold * norms)
        z = torch.where(scaled > threshold, scaled, 0.0).relu()
    return z, ((z / norms) @ w["W_dec"] + w["b_dec"]) / factor


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"architecture": "standard"}, {}),
        ({"architecture": "standard", "apply_b_dec_to_input": False}, {}),
        ({"architecture": "topk", "k": 4}, {}),
        ({"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}, {}),
        ({"architecture": "topk", "k": 4, "normalize_activations": "constant_norm_rescale"}, {}),
        ({"architecture": "jumprelu"}, {"threshold": torch.linspace(0.01, 0.8, N)}),
        ({"architecture": "jumprelu"}, {"log_threshold": torch.linspace(-4, -0.1, N)}),
        (
            {"architecture": "jumprelu", "apply_b_dec_to_input": False},
            {"threshold": torch.full((N,), 0.3)},
        ),
        (
            {"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True},
            {"threshold": torch.linspace(0.01, 0.8, N)},
        ),
        ({"architecture": "batchtopk", "k": 4.5}, {"topk_threshold": torch.tensor(0.8).double()}),
        (
            # The norms of the decoder's rows are about sqrt(12): scaled by them the threshold lets less through.
            {"architecture": "batchtopk", "k": 4.5, "rescale_acts_by_decoder_norm": True},
            {"topk_threshold": torch.tensor(2.5).double()},
        ),
    ],
)
@torch.no_grad()
def test_each_architecture_gives_the_codes_of_the_format(
    config: dict[str, Any], more: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = {**tensors(), **more}
    dictionary = read_saelens(write(tmp_path / "sae", config, **state))
    expected, back = reference(units(), config, state)
    for modality in Modality:
        z = dictionary.encode(units(), modality)
        assert (z > 0).any()
        # float32 against float64 with values of some units: a few 1e-7 relative.
        torch.testing.assert_close(z.double(), expected, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(dictionary.decode(z, modality).double(), back, atol=2e-5, rtol=1e-5)


def test_older_files_that_name_the_activation_function_are_read(tmp_path: Path) -> None:
    config = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    dictionary = read_saelens(write(tmp_path, config, **tensors()))
    assert (dictionary.encode(units(), Modality.IMAGE) > 0).sum(dim=-1).max() == 3


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        ({"architecture": "gated"}, {}, "architecture 'gated'"),
        ({"architecture": "topk"}, {}, "k is from 1 to d_sae"),
        ({"architecture": "topk", "k": 0}, {}, "k is from 1 to d_sae"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, {}, "normalize_activations"),
        ({"architecture": "standard", "reshape_activations": "hook_z"}, {}, "reshape_activations"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, {}, "activation_fn_str"),
        ({"architecture": "jumprelu"}, {}, "has one threshold; this one has none"),
        ({"architecture": "standard"}, {"scaling_factor": torch.ones(N)}, "scaling_factor"),
        ({"architecture": "standard"}, {"W_dec": torch.ones(D, N)}, "W_dec is"),
        ({"architecture": "standard"}, {"b_enc": torch.full((N,), torch.nan)}, "not all finite: b_enc"),
        ({"architecture": "standard", "d_in": "12"}, {}, "d_in and d_sae are sizes"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    config: dict[str, Any], changed: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read_saelens(write(tmp_path, config, **{**tensors(), **changed}))


def test_a_kind_without_a_form_in_the_format_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="ncl has no form"):
        write_saelens(NCL(D, N, 8), tmp_path)
    with pytest.raises(UnsupportedModel, match=CONFIG):
        read_saelens(tmp_path)
