"""Neurons: the embedding's own coordinates as features, z = e. The baseline every table carries."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from services.dictionaries.base import Dictionary, Modality, register


@register("neurons")
class Neurons(Dictionary):
    """The identity dictionary; activations may be negative.

    Parameters
    ----------
    embed_dim : int
        d, which is also n.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim, embed_dim)

    def encode(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return `e`."""
        return e

    def decode(self, z: Float[Tensor, "batch n"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return `z`."""
        return z

    def decoder_rows(self, modality: Modality) -> Float[Tensor, "n d"]:
        """Return the identity."""
        return torch.eye(self.embed_dim)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"embed_dim": self.embed_dim}
