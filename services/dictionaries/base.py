"""The interface of every dictionary, the registry of kinds, and their form on disk."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from services.dictionary_file import KINDS, read_dictionary_json
from services.errors import ManifestError
from services.modality.modalities import Modality as Modality
from services.sparse_row import SparseRow as SparseRow
from services.weights import load_weights, misfit


class Dictionary(nn.Module, ABC):
    """Features of an embedding: z = encode(e), e_hat = decode(z).

    Parameters
    ----------
    embed_dim : int
        d, the size of an embedding.
    n_features : int
        n, the number of features.

    Notes
    -----
    Embeddings are unit-normalised before they are encoded; `decode` returns a reconstruction of that unit
    vector and does not normalise it again.
    """

    kind: ClassVar[str]

    def __init__(self, embed_dim: int, n_features: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.n_features = n_features
        self.name = self.kind

    @abstractmethod
    def encode(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return the activations z of unit embeddings `e` of one modality."""

    def encode_sparse(self, e: Float[Tensor, "batch d"], modality: Modality) -> list[SparseRow]:
        """Return the non-zero activations of `encode`, one row an embedding.

        A kind that knows them before it has spread them over n features says so without the detour.
        """
        return sparse_rows(self.encode(e, modality))

    @abstractmethod
    def decode(self, z: Float[Tensor, "batch n"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return the embeddings e_hat that activations `z` stand for in one modality."""

    @abstractmethod
    def decoder_rows(self, modality: Modality) -> Float[Tensor, "n d"]:
        """Return D, whose row d_j is the direction that feature j adds to an embedding of the modality."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the keyword arguments that build this dictionary again, as JSON values."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained dictionary from what `config` returned."""
        try:
            return cls(**config)
        except TypeError as error:
            raise ManifestError(f"config of a {cls.kind} dictionary: {error}") from error

    def reconstruct(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return decode(encode(e)), the round trip."""
        return self.decode(self.encode(e, modality), modality)

    def save(
        self,
        directory: Path,
        name: str,
        *,
        tower_fingerprint: str,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``<name>.json`` and, where there are parameters, ``<name>.safetensors``.

        Parameters
        ----------
        directory : Path
            The bundle's ``dictionaries/``; made if absent.
        name : str
            File stem, and the name callers use.
        tower_fingerprint : str
            Fingerprint of the towers whose embeddings it was trained on.
        training : mapping or None
            Record of the training, as JSON values.
        """
        directory.mkdir(parents=True, exist_ok=True)
        document = {
            "kind": self.kind,
            "embed_dim": self.embed_dim,
            "n_features": self.n_features,
            "tower_fingerprint": tower_fingerprint,
            "config": self.config(),
            "training": dict(training or {}),
        }
        (directory / f"{name}.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        if state:
            safetensors.torch.save_file(state, str(directory / f"{name}.safetensors"))


_KINDS: dict[str, type[Dictionary]] = {}
D = TypeVar("D", bound=Dictionary)


def register(kind: str) -> Callable[[type[D]], type[D]]:
    """Make a class the dictionary of `kind`, the name that configs use."""

    def add(cls: type[D]) -> type[D]:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not in services.dictionary_file.KINDS")
        cls.kind = kind
        _KINDS[kind] = cls
        return cls

    return add


def dictionary_kinds() -> tuple[str, ...]:
    """Return the kinds that can be loaded, sorted."""
    return tuple(sorted(_KINDS))


def load_dictionary(directory: Path, name: str) -> Dictionary:
    """Load a dictionary that `Dictionary.save` wrote, in eval mode, float32, on the CPU.

    Weights stored as half floats are read as float32.
    """
    document = read_dictionary_json(directory / f"{name}.json")
    # Without memory: the sizes are the file's word, until the weights bear them out.
    with torch.device("meta"):
        dictionary = _KINDS[document["kind"]].from_config(document["config"])
    dictionary.name = name
    weights = directory / f"{name}.safetensors"
    if dictionary.state_dict():
        state = load_weights(weights, "pt")
        shapes = {key: value.shape for key, value in dictionary.state_dict().items()}
        problem = misfit(shapes, {key: value.shape for key, value in state.items()})
        if problem:
            raise ManifestError(f"{weights.name} does not fit its config: {problem}")
        # Assigned: what was built has sizes and no memory yet.
        dictionary.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return dictionary.eval().requires_grad_(False)


def sparse_rows(z: Float[Tensor, "batch n"]) -> list[SparseRow]:
    """Return the non-zero entries of each row of `z`."""
    dense = z.detach().to("cpu", torch.float32).numpy()
    rows, columns = np.nonzero(dense)
    starts = np.searchsorted(rows, np.arange(len(dense) + 1))
    return [
        SparseRow(columns[a:b].astype(np.int32), dense[i, columns[a:b]])
        for i, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True))
    ]
