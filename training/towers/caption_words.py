"""Captions as sums of word vectors: the text side that the image tower learns from.

A sum over a caption's tokens costs next to nothing, so every caption of the corpus can be embedded anew at every
step and all of them can be negatives. A text transformer that starts from scratch cannot do that: with 128
captions a step it took thousands of steps to tell captions apart at all, and held the image tower back (its
embedding used 11 of 256 directions). The transformer that ships learns these sums later (`training.text_tower`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn


class CaptionWords(nn.Module):
    """One vector a token of CLIP's BPE; a caption is the normalised sum of its tokens' vectors.

    Parameters
    ----------
    captions : NDArray
        Distinct captions, str [n].
    token_ids : list[list[int]]
        Tokens of each caption, without start and end.
    dim : int
        Dimensions of the joint embedding.
    """

    def __init__(self, captions: NDArray[np.str_], token_ids: list[list[int]], dim: int) -> None:
        super().__init__()
        self.captions = captions
        self.index = {caption: i for i, caption in enumerate(captions.tolist())}
        self.lengths = np.array([len(ids) for ids in token_ids])
        self._starts = np.cumsum(self.lengths) - self.lengths
        # Only the tokens that occur: the rest of CLIP's 49,408 would be dead weight in the optimiser.
        self.vocabulary, flat = np.unique(np.concatenate(token_ids), return_inverse=True)
        self._flat = flat
        self.vectors = nn.EmbeddingBag(len(self.vocabulary), dim, mode="sum")
        nn.init.normal_(self.vectors.weight, std=dim**-0.5)

    def positions(self, captions: NDArray[np.str_]) -> NDArray[np.int64]:
        """Return the row of each caption, int64 [k].

        Raises
        ------
        KeyError
            When a caption is not among those given at the start.
        """
        return np.array([self.index[caption] for caption in captions.tolist()], dtype=np.int64)

    def forward(self, rows: NDArray[np.int64]) -> Float[Tensor, "k d"]:
        """Return the unit embeddings of the captions at `rows`."""
        lengths = self.lengths[rows]
        offsets = np.cumsum(lengths) - lengths
        picked = np.repeat(self._starts[rows] - offsets, lengths) + np.arange(lengths.sum())
        return self._sum(self._flat[picked], offsets)

    def embed(self, token_ids: list[list[int]]) -> Float[Tensor, "k d"]:
        """Return the unit embeddings of other texts; tokens that no caption has count nothing."""
        known = [np.asarray(ids)[np.isin(ids, self.vocabulary)] for ids in token_ids]
        lengths = np.array([len(ids) for ids in known])
        return self._sum(
            np.searchsorted(self.vocabulary, np.concatenate(known)), np.cumsum(lengths) - lengths
        )

    def _sum(self, tokens: NDArray[np.int64], offsets: NDArray[np.int64]) -> Float[Tensor, "k d"]:
        device = self.vectors.weight.device
        sums = self.vectors(torch.from_numpy(tokens).to(device), torch.from_numpy(offsets).to(device))
        return F.normalize(sums, dim=-1)
