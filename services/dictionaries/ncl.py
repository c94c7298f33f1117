"""Non-negative contrastive learning: features that are trained to match over pairs, not to reconstruct.

    z = ReLU(MLP(e)), the MLP shared by both modalities, trained by symmetric InfoNCE on z.

There is no decoder in training; e_hat = z D + b_m is fitted afterwards by ridge regression, so that NCL can
stand in the same tables as the autoencoders. Source: Wang et al., "Non-negative Contrastive Learning" (ICLR
2024).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from services.dictionaries.base import Dictionary, Modality, register


def ridge(z: Float[Tensor, "batch n"], e: Float[Tensor, "batch d"], penalty: float) -> Float[Tensor, "n d"]:
    """Return argmin_D ||z D - e||^2 + penalty * N * ||D||^2, in float64.

    `z` and `e` are centred by the caller. The penalty is a share of the number of rows N, so that it means
    the same for any sample size.
    """
    z64, e64 = z.double(), e.double()
    gram = z64.T @ z64
    gram.diagonal().add_(penalty * len(z64))
    solution: Tensor = torch.linalg.solve(gram, z64.T @ e64)
    return solution.to(e.dtype)


@register("ncl")
class NCL(Dictionary):
    """A shared non-negative code, decoded by ridge regression.

    Parameters
    ----------
    embed_dim : int
        d.
    n_features : int
        n.
    hidden_dim : int
        Width of the MLP's hidden layer.
    """

    decoder: Tensor
    bias_image: Tensor
    bias_text: Tensor

    def __init__(self, embed_dim: int, n_features: int, hidden_dim: int) -> None:
        super().__init__(embed_dim, n_features)
        self.hidden_dim = hidden_dim
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, n_features)
        )
        self.register_buffer("decoder", torch.zeros(n_features, embed_dim))
        self.register_buffer("bias_image", torch.zeros(embed_dim))
        self.register_buffer("bias_text", torch.zeros(embed_dim))

    def encode(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return z = ReLU(MLP(e)); the modality does not matter."""
        return torch.relu(self.mlp(e))

    def decode(self, z: Float[Tensor, "batch n"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return e_hat = z D + b_m."""
        return torch.addmm(self.bias(modality), z, self.decoder)

    def bias(self, modality: Modality) -> Float[Tensor, " d"]:
        """Return b_m, the intercept of a modality."""
        return self.bias_image if modality is Modality.IMAGE else self.bias_text

    def decoder_rows(self, modality: Modality) -> Float[Tensor, "n d"]:
        """Return D, the same for both modalities."""
        return self.decoder

    @torch.no_grad()
    def fit_decoder(
        self, e_image: Float[Tensor, "images d"], e_text: Float[Tensor, "texts d"], penalty: float = 1e-4
    ) -> None:
        """Fit D and b_m by ridge regression of embeddings on their own activations.

        Parameters
        ----------
        e_image, e_text : float tensors
            Unit embeddings of the training set.
        penalty : float
            Ridge penalty per row.
        """
        z_image, z_text = self.encode(e_image, Modality.IMAGE), self.encode(e_text, Modality.TEXT)
        z = torch.cat([z_image - z_image.mean(0), z_text - z_text.mean(0)])
        e = torch.cat([e_image - e_image.mean(0), e_text - e_text.mean(0)])
        self.decoder.copy_(ridge(z, e, penalty))
        self.bias_image.copy_(e_image.mean(0) - z_image.mean(0) @ self.decoder)
        self.bias_text.copy_(e_text.mean(0) - z_text.mean(0) @ self.decoder)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "embed_dim": self.embed_dim,
            "n_features": self.n_features,
            "hidden_dim": self.hidden_dim,
        }
