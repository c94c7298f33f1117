"""Two SAEs, one a modality, with features matched over true pairs.

A shared dictionary can manufacture single-modality features by splitting one concept in two. Two dictionaries
that never saw each other's modality cannot, so this is the check on the shared one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from services.dictionaries.base import Dictionary, Modality, SparseRow, register
from services.dictionaries.sae import SAE


def correlation_matrix(
    z_image: Float[Tensor, "pairs n"], z_text: Float[Tensor, "pairs m"]
) -> Float[Tensor, "n m"]:
    """Return corr(zI_i, zT_j) over pairs; 0 where a feature is constant."""

    def standardise(z: Tensor) -> Tensor:
        centred = z - z.mean(0)
        norm = centred.norm(dim=0)
        return torch.where(norm > 0, centred / norm.clamp_min(torch.finfo(z.dtype).tiny), 0.0)

    return standardise(z_image).T @ standardise(z_text)


def match_features(
    z_image: Float[Tensor, "pairs n"], z_text: Float[Tensor, "pairs n"]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Match text features to image features by Hungarian assignment on activation correlation.

    Parameters
    ----------
    z_image, z_text : float tensors, shape (pairs, n)
        Activations of true pairs, row i of both being one pair.

    Returns
    -------
    order : int64 array, shape (n,)
        Text feature ``order[j]`` belongs to image feature j.
    correlation : float32 array, shape (n,)
        Of each match.
    """
    # Here, because it takes most of a second, and a server matches nothing.
    from scipy.optimize import linear_sum_assignment

    correlation = correlation_matrix(z_image.float(), z_text.float()).cpu().numpy()
    rows, order = linear_sum_assignment(correlation, maximize=True)
    return order.astype(np.int64), correlation[rows, order].astype(np.float32)


@register("sae-pair")
class SAEPair(Dictionary):
    """One TopK SAE a modality; feature j of one is matched to feature j of the other.

    Parameters
    ----------
    embed_dim, n_features, k, activation, scaled
        As for `SAE`; both sides are alike.
    """

    def __init__(
        self, embed_dim: int, n_features: int, k: int, activation: str = "topk", scaled: bool = False
    ) -> None:
        super().__init__(embed_dim, n_features)
        self.image = SAE(embed_dim, n_features, k, activation, scaled)
        self.text = SAE(embed_dim, n_features, k, activation, scaled)

    @classmethod
    def matched(cls, image: SAE, text: SAE, order: NDArray[np.int64]) -> SAEPair:
        """Join two trained SAEs, with the text features put in `order` (see `match_features`)."""
        pair = cls(**image.config())
        pair.image.load_state_dict(image.state_dict())
        chosen = torch.as_tensor(order, device=text.decoder.device)
        state = dict(text.state_dict())
        state["encoder"] = state["encoder"][:, chosen]
        state["encoder_bias"] = state["encoder_bias"][chosen]
        state["decoder"] = state["decoder"][chosen]
        pair.text.load_state_dict(state)
        return pair.train(image.training)

    def side(self, modality: Modality) -> SAE:
        """Return the SAE of one modality."""
        return self.image if modality is Modality.IMAGE else self.text

    def encode(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return the activations of the modality's own SAE."""
        return self.side(modality).encode(e, modality)

    def encode_sparse(self, e: Float[Tensor, "batch d"], modality: Modality) -> list[SparseRow]:
        """Return the non-zero activations of the modality's own SAE."""
        return self.side(modality).encode_sparse(e, modality)

    def decode(self, z: Float[Tensor, "batch n"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return the reconstruction by the modality's own SAE."""
        return self.side(modality).decode(z, modality)

    def decoder_rows(self, modality: Modality) -> Float[Tensor, "n d"]:
        """Return D of the modality's own SAE."""
        return self.side(modality).decoder_rows(modality)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self.image.config()
