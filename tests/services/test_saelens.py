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
from services.modality.table import ModalitySettings, score_pairs

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
        SAE(D, N, K, scaled=True),
        SAE(D, N, K, "batch-topk"),
        SAE(D, N, N, "jump-relu"),
        SAEPair(D, N, K),
        SAEPair(D, N, K, scaled=True),
        SAEPair(D, N, K, "batch-topk"),
    ],
    ids=["topk", "scaled", "batch-topk", "jump-relu", "pair", "scaled-pair", "pair-batch-topk"],
)
@torch.no_grad()
def test_a_dictionary_comes_back_with_the_same_codes(dictionary: Any, tmp_path: Path) -> None:
    randomised(dictionary)
    for modality in Modality:
        side = dictionary.side(modality) if isinstance(dictionary, SAEPair) else dictionary
        side.normalise_decoder()
        if side.scaled:
            side.scale.uniform_(0.5, 4)
    write_saelens(dictionary, tmp_path)
    back = read_saelens(tmp_path)
    assert isinstance(back, SAEPair) == isinstance(dictionary, SAEPair)
    for modality in Modality:
        z = dictionary.encode(units(), modality)
        assert 0 < (z > 0).sum() < z.numel()
        # The same float32 weights in the same products; a scale goes through a length, which rounds.
        torch.testing.assert_close(back.encode(units(), modality), z, atol=1e-6, rtol=1e-6)
        sparse = back.encode_sparse(units(), modality)
        for row, dense in zip(sparse, back.encode(units(), modality), strict=True):
            assert torch.equal(torch.from_numpy(row.values), dense[row.indices.astype(int)])
        torch.testing.assert_close(
            back.decode(z, modality), dictionary.decode(z, modality), atol=1e-5, rtol=1e-6
        )
        rows = dictionary.decoder_rows(modality)
        torch.testing.assert_close(back.decoder_rows(modality), rows, atol=1e-6, rtol=0)


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
    rescaled = config.get("rescale_acts_by_decoder_norm")
    norms = w["W_dec"].norm(dim=-1) if rescaled else torch.ones(N).double()
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
    back = ((z / norms) @ w["W_dec"] + w["b_dec"]) / factor
    # An activation here is the length that its feature adds to the embedding.
    return z / norms * w["W_dec"].norm(dim=-1) / factor, back


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
        (
            {
                "architecture": "batchtopk",
                "k": 4.5,
                "rescale_acts_by_decoder_norm": True,
                "normalize_activations": "constant_norm_rescale",
            },
            {"topk_threshold": torch.tensor(8.0).double()},
        ),
        (
            {"architecture": "batchtopk", "k": 4.5, "normalize_activations": "constant_norm_rescale"},
            {"topk_threshold": torch.tensor(2.5).double()},
        ),
        (
            {
                "architecture": "topk",
                "k": 4,
                "rescale_acts_by_decoder_norm": True,
                "normalize_activations": "constant_norm_rescale",
            },
            {},
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
        assert (z > 0).sum() == (expected > 0).sum() < z.numel()
        torch.testing.assert_close(dictionary.decoder_rows(modality).norm(dim=-1), torch.ones(N))
        # float32 against float64 with values of some units: a few 1e-7 relative.
        torch.testing.assert_close(z.double(), expected, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(dictionary.decode(z, modality).double(), back, atol=2e-5, rtol=1e-5)


PLANTED = {
    "relu": ({"architecture": "standard"}, {}),
    "jumprelu": ({"architecture": "jumprelu"}, {"threshold": torch.full((N,), 0.1)}),
    "topk": ({"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}, {}),
    "batchtopk": (
        {"architecture": "batchtopk", "k": K, "rescale_acts_by_decoder_norm": True},
        {"topk_threshold": torch.tensor(0.1).double()},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "more"), PLANTED.values(), ids=PLANTED)
@torch.no_grad()
def test_an_equivalent_dictionary_gets_equal_codes_and_labels(
    config: dict[str, Any], more: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = {**tensors(), **more}
    state["W_dec"] = torch.nn.functional.normalize(state["W_dec"], dim=-1)
    # Rows of length 2 to 6, and activations that are smaller by as much: the same autoencoder.
    lengths = torch.linspace(2, 6, N)
    other = {
        **state, "W_dec": state["W_dec"] * lengths[:, None], "W_enc": state["W_enc"] / lengths,
        "b_enc": state["b_enc"] / lengths,
    }  # fmt: skip
    if "threshold" in state:
        other["threshold"] = state["threshold"] / lengths
    first = read_saelens(write(tmp_path / "unit", config, **state))
    second = read_saelens(write(tmp_path / "long", config, **other))
    labels = []
    for dictionary in (first, second):
        z = [dictionary.encode(units(seed), m).numpy() for seed, m in enumerate(Modality)]
        # Features of either modality: half of the features are silent in the other one.
        z[0][:, : N // 3] = 0
        z[1][:, -N // 3 :] = 0
        labels.append((z, score_pairs(*z, settings=ModalitySettings(resamples=100, shuffles=100))))
    (z, table), (z_other, table_other) = labels
    for a, b in zip(z, z_other, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    assert len(set(table.label)) > 1
    assert table.label.tolist() == table_other.label.tolist()
    np.testing.assert_allclose(table.energy_image, table_other.energy_image, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_a_feature_that_adds_nothing_stays_finite(tmp_path: Path) -> None:
    state = tensors()
    state["W_dec"][3] = 0
    for number, config in enumerate(({"architecture": "standard"}, PLANTED["topk"][0])):
        dictionary = read_saelens(write(tmp_path / str(number), config, **state))
        z = dictionary.encode(units(), Modality.IMAGE)
        assert torch.isfinite(z).all() and torch.isfinite(dictionary.decode(z, Modality.IMAGE)).all()
        assert bool((z[:, 3] > 0).any()) == (number == 0)


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
