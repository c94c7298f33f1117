from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import Ridge

from services.dictionaries import (
    NCL,
    SAE,
    Dictionary,
    Modality,
    Neurons,
    SAEPair,
    dictionary_kinds,
    load_dictionary,
    match_features,
    sparse_rows,
    topk_relu,
)
from services.dictionaries.ncl import ridge
from services.errors import ManifestError

D, N, K = 12, 40, 5
BOTH = [Modality.IMAGE, Modality.TEXT]


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, D, generator=generator), dim=-1)


def random_sae(activation: str = "topk") -> SAE:
    sae = SAE(D, N, K, activation)
    with torch.no_grad():
        sae.pre_bias_image.normal_(std=0.1)
        sae.pre_bias_text.normal_(std=0.1)
        sae.encoder_bias.normal_(std=0.1)
    return sae.eval()


def every_dictionary() -> list[Dictionary]:
    torch.manual_seed(0)
    ncl = NCL(D, N, 24)
    ncl.fit_decoder(unit(50, 1), unit(50, 2))
    pair = SAEPair.matched(random_sae(), random_sae(), np.arange(N)[::-1].copy())
    return [Neurons(D), random_sae(), random_sae("batch-topk"), pair, ncl]


ALL = every_dictionary()
IDS = [f"{d.kind}-{i}" for i, d in enumerate(ALL)]


def test_every_kind_is_tested():
    assert {d.kind for d in ALL} == set(dictionary_kinds()) == {"neurons", "sae", "sae-pair", "ncl"}


@pytest.mark.parametrize("dictionary", ALL, ids=IDS)
@pytest.mark.parametrize("modality", BOTH)
def test_shapes_and_finiteness(dictionary, modality):
    z = dictionary.encode(unit(7), modality)
    assert z.shape == (7, dictionary.n_features)
    e_hat = dictionary.decode(z, modality)
    assert e_hat.shape == (7, D)
    assert dictionary.decoder_rows(modality).shape == (dictionary.n_features, D)
    assert torch.isfinite(z).all()
    assert torch.isfinite(e_hat).all()


@pytest.mark.parametrize("dictionary", ALL, ids=IDS)
@pytest.mark.parametrize("modality", BOTH)
def test_decoding_is_linear_in_the_activations_with_the_decoder_rows(dictionary, modality):
    zero = torch.zeros(1, dictionary.n_features)
    bias = dictionary.decode(zero, modality)
    z = torch.randn(4, dictionary.n_features)
    expected = z @ dictionary.decoder_rows(modality) + bias
    torch.testing.assert_close(dictionary.decode(z, modality), expected)


@pytest.mark.parametrize("dictionary", ALL, ids=IDS)
def test_a_dictionary_survives_the_disk(dictionary, tmp_path):
    dictionary.save(tmp_path, "mine", tower_fingerprint="f" * 64, training={"epochs": 3})
    again = load_dictionary(tmp_path, "mine")
    assert (again.name, again.kind, again.training) == ("mine", dictionary.kind, False)
    for modality in BOTH:
        torch.testing.assert_close(
            again.encode(unit(3), modality), dictionary.encode(unit(3), modality), rtol=0, atol=0
        )
    assert json.loads((tmp_path / "mine.json").read_text())["training"] == {"epochs": 3}


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    random_sae().half().save(tmp_path, "half", tower_fingerprint="f")
    assert all(p.dtype == torch.float32 for p in load_dictionary(tmp_path, "half").parameters())


def test_weights_of_another_size_and_unknown_kinds_are_refused(tmp_path):
    random_sae().save(tmp_path, "mine", tower_fingerprint="f")
    document = json.loads((tmp_path / "mine.json").read_text())
    for change in (
        {"config": {**document["config"], "n_features": N + 1}},
        {"config": {**document["config"], "colour": "red"}},
        {"config": {**document["config"], "k": 0}},
        {"config": {**document["config"], "activation": "jump"}},
        {"kind": "transcoder"},
        {"extra": 1},
    ):
        (tmp_path / "mine.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(ManifestError):
            load_dictionary(tmp_path, "mine")
    (tmp_path / "mine.json").write_text(json.dumps(document))
    state = safetensors.torch.load_file(str(tmp_path / "mine.safetensors"))
    del state["decoder"]
    safetensors.torch.save_file(state, str(tmp_path / "mine.safetensors"))
    with pytest.raises(ManifestError, match="decoder"):
        load_dictionary(tmp_path, "mine")


# TopK.


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 20))
def test_topk_keeps_at_most_k_and_only_the_largest_positive(seed, k, n):
    pre = torch.randn(4, n, generator=torch.Generator().manual_seed(seed))
    z = topk_relu(pre, k)
    assert ((z != 0).sum(1) <= k).all()
    for row, kept in zip(pre.numpy(), z.numpy(), strict=True):
        expected = np.zeros(n)
        for j in sorted(range(n), key=lambda j: -row[j])[:k]:
            expected[j] = max(row[j], 0)
        np.testing.assert_array_equal(kept, expected.astype(np.float32))


@pytest.mark.parametrize("modality", BOTH)
def test_an_sae_is_its_equations_in_numpy(modality):
    sae, e = random_sae(), unit(6)
    parameters = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    bias = parameters[f"pre_bias_{modality.value}"]
    z = np.zeros((6, N))
    for i, row in enumerate(e.double().numpy()):
        pre = (row - bias) @ parameters["encoder"] + parameters["encoder_bias"]
        for j in np.argsort(-pre)[:K]:
            z[i, j] = max(pre[j], 0.0)
    # float32 against float64: 12 products of order 1, each rounded at 6e-8.
    np.testing.assert_allclose(sae.encode(e, modality).detach(), z, atol=1e-6)
    np.testing.assert_allclose(
        sae.reconstruct(e, modality).detach(), z @ parameters["decoder"] + bias, atol=1e-6
    )


def test_decoder_rows_of_a_new_sae_are_unit_and_can_be_made_so_again():
    sae = random_sae()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(N))
    with torch.no_grad():
        sae.decoder.mul_(3)
    sae.normalise_decoder()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(N))


def test_batch_topk_shares_k_in_training_and_uses_its_threshold_when_served():
    sae = random_sae("batch-topk").train()
    assert (sae.encode(unit(9), Modality.IMAGE) != 0).sum() <= 9 * K
    sae.eval()
    sae.threshold.fill_(0.2)
    z = sae.encode(unit(9), Modality.IMAGE)
    assert z[z != 0].min() > 0.2
    alone = torch.cat([sae.encode(unit(9)[i : i + 1], Modality.IMAGE) for i in range(9)])
    torch.testing.assert_close(z, alone)


# Pairs.


def test_matching_is_the_best_assignment_by_correlation():
    rng = np.random.default_rng(0)
    z_image = rng.random((60, 8)).astype(np.float32)
    truth = rng.permutation(8)
    z_text = np.empty_like(z_image)
    z_text[:, truth] = z_image + 0.1 * rng.random((60, 8)).astype(np.float32)
    order, correlation = match_features(torch.from_numpy(z_image), torch.from_numpy(z_text))
    assert order.tolist() == truth.tolist()
    full = np.corrcoef(z_image.T, z_text.T)[:8, 8:]
    rows, columns = linear_sum_assignment(-full)
    np.testing.assert_allclose(correlation, full[rows, columns], atol=1e-5)


def test_matching_bears_features_that_never_fire():
    z = torch.rand(20, 4)
    z[:, 2] = 0
    order, correlation = match_features(z, z)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert correlation[2] == 0


def test_a_matched_pair_reorders_the_text_side_only():
    image, text = random_sae(), random_sae()
    order = np.random.default_rng(0).permutation(N)
    pair = SAEPair.matched(image, text, order)
    e = unit(5)
    torch.testing.assert_close(pair.encode(e, Modality.IMAGE), image.encode(e, Modality.IMAGE))
    torch.testing.assert_close(
        pair.encode(e, Modality.TEXT), text.encode(e, Modality.TEXT)[:, torch.from_numpy(order)]
    )
    torch.testing.assert_close(pair.reconstruct(e, Modality.TEXT), text.reconstruct(e, Modality.TEXT))


# NCL.


def test_ncl_is_not_negative_and_shared():
    ncl = ALL[-1]
    assert (ncl.encode(unit(5), Modality.IMAGE) >= 0).all()
    torch.testing.assert_close(ncl.encode(unit(5), Modality.IMAGE), ncl.encode(unit(5), Modality.TEXT))


def test_ridge_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    z, e = rng.standard_normal((30, 6)), rng.standard_normal((30, 4))
    expected = Ridge(alpha=0.01 * 30, fit_intercept=False).fit(z, e).coef_.T
    ours = ridge(torch.from_numpy(z), torch.from_numpy(e), 0.01)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_the_fitted_decoder_reconstructs_what_it_was_fitted_on():
    ncl, e_image, e_text = NCL(D, 64, 64), unit(400, 3), unit(400, 4)
    ncl.fit_decoder(e_image, e_text, penalty=1e-8)
    error = (ncl.reconstruct(e_image, Modality.IMAGE) - e_image).pow(2).sum() / e_image.pow(2).sum()
    # 64 random ReLU features span almost all of 12 dimensions; a wrong intercept or order would leave far more.
    assert error < 0.1


# Sparse rows.


@given(st.integers(0, 10_000))
def test_sparse_rows_hold_every_non_zero_in_order(seed):
    dense = topk_relu(torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)), 3)
    rows = sparse_rows(dense)
    for row, expected in zip(rows, dense.numpy(), strict=True):
        assert row.indices.dtype == np.int32
        assert row.indices.tolist() == np.flatnonzero(expected).tolist()
        assert row.values.tolist() == expected[np.flatnonzero(expected)].tolist()
    assert sparse_rows(torch.zeros(0, 9)) == []


@pytest.mark.parametrize("dictionary", ALL, ids=IDS)
@pytest.mark.parametrize("modality", BOTH)
def test_sparse_activations_are_the_non_zeros_of_the_dense_ones(dictionary, modality):
    e = unit(9, 3)
    expected = sparse_rows(dictionary.encode(e, modality))
    found = dictionary.encode_sparse(e, modality)
    for row, dense in zip(found, expected, strict=True):
        assert row.indices.dtype == np.int32
        assert row.indices.tolist() == dense.indices.tolist()
        assert row.values.tolist() == dense.values.tolist()
    assert dictionary.encode_sparse(torch.zeros(0, D), modality) == []
