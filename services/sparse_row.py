"""The features that one input activates, as dictionaries give them and scores take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SparseRow:
    """The non-zero activations of one input.

    Attributes
    ----------
    indices : int32 array, shape (nnz,)
        Features, ascending.
    values : float32 array, shape (nnz,)
        Their activations.
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]
