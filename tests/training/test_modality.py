from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from services.dictionaries import SAE, Dictionary, Modality, Neurons
from training.modality import score as modality
from training.modality.score import activations

D, N = 8, 64


def units(n: int) -> torch.Tensor:
    e = torch.from_numpy(np.random.default_rng(0).standard_normal((n, D)).astype(np.float32))
    return torch.nn.functional.normalize(e, dim=-1)


@pytest.mark.parametrize("rows", [1, 9, 10, 25])
@pytest.mark.parametrize("dictionary", [SAE(D, N, 4), Neurons(D)], ids=["sparse", "dense"])
def test_activations_in_chunks_are_those_of_all_at_once(
    dictionary: Dictionary, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modality, "CHUNK", 10)
    e = units(rows)
    with torch.no_grad():
        expected = dictionary.eval().encode(e, Modality.IMAGE).numpy()
    z = activations(dictionary, e, Modality.IMAGE)
    assert sp.issparse(z) == isinstance(dictionary, SAE)
    # A product of another shape may add in another order.
    np.testing.assert_allclose(z.toarray() if sp.issparse(z) else z, expected, atol=1e-6)
    assert z.dtype == np.float32


@pytest.mark.parametrize("dictionary", [SAE(D, N, 4), Neurons(D)], ids=["sparse", "dense"])
def test_no_more_than_the_first_and_the_last_chunk_are_held_as_they_were_encoded(
    dictionary: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modality, "CHUNK", 10)
    encode, made, held = dictionary.encode, [], []

    def spy(e: torch.Tensor, side: Modality) -> SimpleNamespace:
        held.append(sum(chunk() is not None for chunk in made))
        # Not the tensor, which an array outlives; and a copy: the neurons' activations are the embeddings themselves.
        z = encode(e, side).numpy().copy()
        made.append(weakref.ref(z))
        return SimpleNamespace(numpy=lambda: z)

    monkeypatch.setattr(dictionary, "encode", spy)
    activations(dictionary, units(100), Modality.IMAGE)
    assert len(made) == 10
    assert max(held) <= 2
