"""What a trained dictionary has to beat: principal components and random directions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from services.dictionaries import SAE, Dictionary, Modality
from training.dictionaries.sae import EmbeddingPairs

IMAGE, TEXT = Modality.IMAGE, Modality.TEXT


class PCA(Dictionary):
    """Principal components of both modalities together, each centred on its own mean; activations are signed.

    Parameters
    ----------
    pairs : EmbeddingPairs
        Fitted on these.
    n_components : int
        Components kept, the same for every embedding.
    """

    kind: ClassVar[str] = "pca"

    def __init__(self, pairs: EmbeddingPairs, n_components: int) -> None:
        images, texts = pairs.sides()
        super().__init__(images.shape[1], n_components)
        self.mean = {IMAGE: images.mean(0), TEXT: texts.mean(0)}
        centred = torch.cat([images - self.mean[IMAGE], texts - self.mean[TEXT]])
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        self.variance = values.flip(0) / values.sum()
        self.rows = vectors.T.flip(0)[:n_components].contiguous()

    def encode(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return the projections on the components."""
        return (e - self.mean[modality]) @ self.rows.T

    def decode(self, z: Float[Tensor, "batch n"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return the sum of the components."""
        return z @ self.rows + self.mean[modality]

    def decoder_rows(self, modality: Modality) -> Float[Tensor, "n d"]:
        """Return the components."""
        return self.rows

    def config(self) -> dict[str, Any]:
        """Return the number of components."""
        return {"n_components": self.n_features}


def pca_for_fvu(pairs: EmbeddingPairs, fvu: float) -> PCA:
    """Return the smallest PCA that leaves at most the share `fvu` of the variance unexplained on the pairs."""
    full = PCA(pairs, 1)
    retained = int((full.variance.cumsum(0) < 1 - fvu).sum()) + 1
    return PCA(pairs, min(retained, pairs.images.shape[1]))


@torch.no_grad()
def random_dictionary(pairs: EmbeddingPairs, n_features: int, k: int, seed: int = 0) -> SAE:
    """Return a TopK dictionary of random unit rows, its activations scaled once to fit the pairs best."""
    torch.manual_seed(seed)
    sae = SAE(pairs.images.shape[1], n_features, k).eval().requires_grad_(False)
    images, texts = pairs.sides()
    sae.pre_bias_image.copy_(images.mean(0))
    sae.pre_bias_text.copy_(texts.mean(0))
    some = slice(4000)
    x = torch.cat([images[some] - sae.pre_bias_image, texts[some] - sae.pre_bias_text])
    back = torch.cat([sae.encode(e[some], m) @ sae.decoder for e, m in ((images, IMAGE), (texts, TEXT))])
    sae.encoder.mul_((x * back).sum() / (back**2).sum())
    return sae
