"""Embeddings and sparse features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from monofacet import _exceptions as exceptions
from monofacet._convert import wire
from monofacet._types.brief import Brief

__all__ = [
    "EncodeResult",
    "Floats",
    "SparseFeatures",
    "StreamResult",
    "Timings",
]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, repr=False)
class Timings(Brief):
    """Where a call's time went on the server.

    Attributes
    ----------
    queue
        Seconds that the inputs waited for the model.
    inference
        Seconds of decoding, towers and dictionary.
    """

    queue: float
    inference: float


def _activations(message: Any) -> Floats:
    if len(message.indices) != len(message.values):
        raise exceptions.ResponseError(
            f"the answer holds {len(message.indices)} indices for {len(message.values)} activations"
        )
    return np.array(message.values, dtype=np.float32)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SparseFeatures(Brief):
    """The active features of one input.

    Attributes
    ----------
    dictionary
        Name of the dictionary.
    indices
        Feature ids, int64, shape [active], largest activation first.
    values
        Activations, float32, shape [active].
    """

    dictionary: str
    indices: npt.NDArray[np.int64]
    values: Floats = field(metadata=wire(_activations))

    def __len__(self) -> int:
        return len(self.indices)

    def dense(self, n_features: int) -> Floats:
        """Spread the activations over all features.

        Parameters
        ----------
        n_features
            Size of the dictionary (`Model.dictionaries`).

        Returns
        -------
        ndarray of float32, shape [n_features]
            Zero where nothing was active.
        """
        z = np.zeros(n_features, dtype=np.float32)
        z[self.indices] = self.values
        return z


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodeResult(Brief):
    """Embeddings and features of a batch, in the order of the inputs.

    Attributes
    ----------
    embeddings
        Float32, shape [inputs, embed_dim], rows of length 1. Shape [inputs, 0] if they were not asked for.
    norms
        Lengths before normalisation, float32, shape [inputs]: ``embeddings * norms[:, None]`` is what the
        tower gave.
    features
        One an input; empty if no dictionary was asked for.
    timings
        The longest queueing and the sum of inference over the calls that it took.
    bundle
        The bundle that answered, as ``name@hash``.
    """

    embeddings: Floats
    norms: Floats
    features: tuple[SparseFeatures, ...]
    timings: Timings
    bundle: str

    def __len__(self) -> int:
        return len(self.norms)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StreamResult(Brief):
    """The answer to one item of a stream: an embedding, or an error of this item alone.

    Attributes
    ----------
    id
        The item's id.
    embedding
        Float32, shape [embed_dim], of length 1; empty if embeddings were not asked for or the item is bad.
    norm
        Length before normalisation; 0 for a bad item.
    features
        None if no dictionary was asked for, or the item is bad.
    error
        Why the item is bad: refused by the server, or not readable here. None for a good one.
    timings
        Of the batch that the item was in; None for a bad item.
    bundle
        The bundle that answered; empty for an item that was not sent.
    """

    id: str
    embedding: Floats
    norm: float
    features: SparseFeatures | None
    error: exceptions.MonofacetError | None
    timings: Timings | None
    bundle: str

    @property
    def ok(self) -> bool:
        """Whether the item was encoded."""
        return self.error is None
