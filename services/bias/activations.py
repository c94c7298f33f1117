"""Sparse activations as three arrays, for code that must not import scipy; scipy's csr arrays serve as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

# Rows of D that are gathered at once: 8 MB at d = 256.
GATHER = 8_192


class SparseActivations(Protocol):
    """Activations of many inputs: of input i, features `indices[indptr[i]:indptr[i + 1]]` with `data` there."""

    @property
    def data(self) -> Any:
        """Activations, float32, shape (nnz,)."""

    @property
    def indices(self) -> Any:
        """Features, int, shape (nnz,)."""

    @property
    def indptr(self) -> Any:
        """Where each input begins, int, shape (inputs + 1,)."""


class Row(Protocol):
    """The active features of one input."""

    @property
    def indices(self) -> NDArray[np.int32]:
        """Features, shape (nnz,)."""

    @property
    def values(self) -> NDArray[np.float32]:
        """Activations, shape (nnz,)."""


@dataclass(frozen=True)
class Stacked:
    """Activations of many inputs; see `SparseActivations`."""

    data: Float[np.ndarray, " nnz"]
    indices: Int[np.ndarray, " nnz"]
    indptr: Int[np.ndarray, " starts"]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Stacked:
        """Stack the active features of inputs."""
        return cls(
            np.concatenate([np.empty(0, np.float32), *(row.values for row in rows)]),
            np.concatenate([np.empty(0, np.int32), *(row.indices for row in rows)]),
            np.concatenate([[0], np.cumsum([len(row.indices) for row in rows], dtype=np.int64)]),
        )

    @classmethod
    def silent(cls, inputs: int) -> Stacked:
        """Return the activations of inputs whose features nobody asked for."""
        return cls(np.empty(0, np.float32), np.empty(0, np.int32), np.zeros(inputs + 1, np.int64))


def decode_part(
    z: SparseActivations, chosen: NDArray[np.bool_], rows: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "batch d"]:
    """Return sum_{j chosen} z_j d_j of each input, float32.

    Parameters
    ----------
    z : activations of B inputs
        Sparse.
    chosen : bool array, shape (n,)
        Features to sum over.
    rows : float32 array, shape (n, d)
        D.
    """
    inputs = len(z.indptr) - 1
    entries = np.flatnonzero(chosen[z.indices])
    owner = np.searchsorted(z.indptr, entries, side="right") - 1
    result = np.zeros((inputs, rows.shape[1]), np.float32)
    start = 0
    while start < len(entries):
        stop = min(start + GATHER, len(entries))
        # An input's entries stay together, unless it alone has more than are gathered at once.
        if stop < len(entries) and owner[stop] == owner[stop - 1] and owner[start] != owner[stop]:
            stop = int(np.searchsorted(owner, owner[stop]))
        part, owners = entries[start:stop], owner[start:stop]
        begins = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
        terms = z.data[part][:, None] * rows[z.indices[part]]
        result[owners[begins]] += np.add.reduceat(terms, begins, axis=0)
        start = stop
    return result
