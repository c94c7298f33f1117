"""Captions as sums of word vectors: the text side that the image tower learns from.

A sum over a caption's tokens costs next to nothing, so every caption of the corpus can be embedded anew at every
step and all of them can be negatives. A text transformer that starts from scratch cannot do that: with 128
captions a step it took thousands of steps to tell captions apart at all, and held the image tower back (its
embedding used 11 of 256 directions). The transformer that ships learns these sums later (`training.towers.text_tower`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Captions:
    """Every caption that a drawing may have, with and without skin tone, in order.

    Parameters
    ----------
    texts : NDArray
        Distinct captions, str [n].
    concept : NDArray
        A number for the concept of each, int64 [n].
    gender : NDArray
        "woman", "man" or "" where the name says neither, str [n].
    drawn : NDArray
        Which are of emoji: these are answers at every step; int64.
    """

    texts: NDArray[np.str_]
    concept: NDArray[np.int64]
    gender: NDArray[np.str_]
    drawn: NDArray[np.int64]

    @classmethod
    def of(cls, columns: dict[str, NDArray], emoji: NDArray[np.int64], icons: NDArray[np.int64]) -> Captions:
        """Return the captions of the corpus rows `emoji` and `icons`."""
        rows = np.concatenate([emoji, icons])
        texts, first = np.unique(
            np.concatenate([columns["caption"][rows], columns["concept"][rows]]), return_index=True
        )
        concept = np.unique(np.tile(columns["concept"][rows], 2)[first], return_inverse=True)[1]
        drawn = np.isin(texts, np.concatenate([columns["caption"][emoji], columns["concept"][emoji]]))
        return cls(texts, concept, np.tile(columns["gender"][rows], 2)[first], np.flatnonzero(drawn))


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
