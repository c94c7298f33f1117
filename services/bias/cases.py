"""What an audit is given: embeddings with their features, and what is known of each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    import scipy.sparse as sp

WOMAN, MAN, UNGENDERED = 1, 0, -1
# Of each gender; with one there is nothing to compare.
MIN_ITEMS = 2
# Clusters that an interval needs. Of one every resample is the sample itself, so that the interval has no width and any
# change leaves 0 out; of four, one resample in 64 is still one cluster over and over.
MIN_CLUSTERS = 5


@dataclass(frozen=True)
class Cases:
    """Labelled items.

    Attributes
    ----------
    e : float32 array, shape (N, d)
        Unit embeddings.
    z : csr array, shape (N, n)
        Their activations in one dictionary.
    is_text : bool array, shape (N,)
        Whether an item is a text.
    gender : int array, shape (N,)
        WOMAN, MAN or UNGENDERED.
    profession : str array, shape (N,)
        "" where there is none.
    cluster : int array, shape (N,)
        Items that are not independent share a number.
    """

    e: Float[np.ndarray, "n d"]
    z: sp.csr_array
    is_text: Bool[np.ndarray, " n"]
    gender: Int[np.ndarray, " n"]
    profession: np.ndarray
    cluster: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.e)

    def take(self, index: np.ndarray) -> Cases:
        """Return the items of `index`, int or bool."""
        return Cases(
            self.e[index],
            self.z[index],
            self.is_text[index],
            self.gender[index],
            self.profession[index],
            self.cluster[index],
        )

    def clusters(self, *genders: int) -> int:
        """Return how many clusters the items of any of `genders` are of: what an interval of theirs rests on."""
        return len(np.unique(self.cluster[np.isin(self.gender, genders)]))

    def groups(self) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        """Return the professions by name, and each item's position among them; -1 where it has none."""
        names = np.unique(self.profession[self.profession != ""])
        codes = np.searchsorted(names, self.profession) if len(names) else np.zeros(len(self), np.int64)
        return names, np.where(self.profession != "", codes, -1)
