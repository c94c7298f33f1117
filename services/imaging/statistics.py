"""Quantiles of the activations that each feature has where it is active, per modality.

They turn "this feature, strongly" into a number: `SetQuantile(0.95)` sets a feature to what its strongest
twentieth of inputs reach.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int
from numpy.typing import NDArray

from services.errors import BundleFileError, InvalidInput
from services.modality.modalities import Modality
from services.weights import open_weights

# Twentieths: the ends of an empirical distribution of a sparse feature are known no better.
PROBABILITIES = np.linspace(0.0, 1.0, 21)

# Fewer activations than this say nothing about a distribution's ends.
ENOUGH = 10


@dataclass(frozen=True)
class ActivationStatistics:
    """The active distribution of each feature.

    Attributes
    ----------
    probabilities : float32 array, shape (q,)
        Ascending, from 0 to 1.
    image, text : float32 array, shape (n, q)
        Quantiles of the non-zero activations over images and over texts; NaN where the feature was never
        active.
    count_image, count_text : int32 array, shape (n,)
        Inputs that activated the feature.
    tower_fingerprint : str
        Of the towers that embedded the inputs; empty when unknown.
    """

    probabilities: Float[NDArray[np.float32], " q"]
    image: Float[NDArray[np.float32], "n q"]
    text: Float[NDArray[np.float32], "n q"]
    count_image: Int[NDArray[np.int32], " n"]
    count_text: Int[NDArray[np.int32], " n"]
    tower_fingerprint: str = ""

    @classmethod
    def measure(cls, z_image: Any, z_text: Any) -> ActivationStatistics:
        """Measure on activations.

        Parameters
        ----------
        z_image, z_text : float32 array or scipy.sparse.csr_array, shape (inputs, n)
            Activations of images and of texts.
        """
        image, count_image = active_quantiles(z_image)
        text, count_text = active_quantiles(z_text)
        return cls(PROBABILITIES.astype(np.float32), image, text, count_image, count_text)

    def write(self, path: Path, *, dictionary: str, tower_fingerprint: str) -> None:
        """Write safetensors; the quantiles as half floats, whose 0.05% is far below their own error."""
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(
            {
                "probabilities": self.probabilities.astype(np.float32),
                "image": self.image.astype(np.float16),
                "text": self.text.astype(np.float16),
                "count_image": self.count_image.astype(np.int32),
                "count_text": self.count_text.astype(np.int32),
            },
            str(path),
            {"dictionary": dictionary, "tower_fingerprint": tower_fingerprint},
        )
        _sort_metadata(path)

    @classmethod
    def read(cls, path: Path) -> ActivationStatistics:
        """Read what `write` wrote.

        Raises
        ------
        BundleFileError
            Where it is something else.
        """
        try:
            with open_weights(path) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            statistics = cls(
                tensors["probabilities"].astype(np.float32),
                tensors["image"].astype(np.float32),
                tensors["text"].astype(np.float32),
                tensors["count_image"],
                tensors["count_text"],
                metadata.get("tower_fingerprint", ""),
            )
        except KeyError as error:
            raise BundleFileError(f"{path.name} holds no activation quantiles") from error
        shapes = {statistics.image.shape, statistics.text.shape}
        if shapes != {(len(statistics.count_image), len(statistics.probabilities))}:
            raise BundleFileError(f"{path.name}: quantiles of shapes {sorted(shapes)}")
        return statistics

    @property
    def active(self) -> NDArray[np.bool_]:
        """Whether each feature was ever active, shape (n,)."""
        seen: NDArray[np.bool_] = (self.count_image > 0) | (self.count_text > 0)
        return seen

    def quantile(self, features: NDArray[np.int64], q: float, modality: Modality) -> NDArray[np.float32]:
        """Return the activation of each feature at a quantile.

        Of the modality that is steered where the feature fires there often enough, else of the other one: an
        image feature set in a text's embedding gets the strength that it has in images.

        Parameters
        ----------
        features : int64 array, shape (k,)
            Feature ids.
        q : float
            In [0, 1]; between the stored probabilities it is interpolated.
        modality : Modality
            Of the embedding that is steered.

        Raises
        ------
        InvalidInput
            Where a feature was never active.
        """
        own, own_count, other, other_count = (
            (self.image, self.count_image, self.text, self.count_text)
            if modality is Modality.IMAGE
            else (self.text, self.count_text, self.image, self.count_image)
        )
        take_own = own_count[features] >= np.minimum(ENOUGH, np.maximum(other_count[features], 1))
        rows = np.where(take_own[:, None], own[features], other[features])
        dead = features[~self.active[features]]
        if len(dead):
            message = f"feature {dead[0]} is never active, so it has no quantiles"
            raise InvalidInput(message, [("ids", message)], reason="FEATURE_NEVER_ACTIVE")
        return np.array([np.interp(q, self.probabilities, row) for row in rows], np.float32)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in another one in each process."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def active_quantiles(z: Any) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return quantiles, shape (n, q), and counts, shape (n,), of the non-zero entries of each column of `z`."""
    columns = z.tocsc() if hasattr(z, "tocsc") else None
    n = z.shape[1]
    quantiles = np.full((n, len(PROBABILITIES)), np.nan, np.float32)
    counts = np.zeros(n, np.int32)
    for j in range(n):
        column = z[:, j] if columns is None else columns.data[columns.indptr[j] : columns.indptr[j + 1]]
        active = column[column != 0]
        counts[j] = len(active)
        if len(active):
            quantiles[j] = np.quantile(active, PROBABILITIES)
    return quantiles, counts
