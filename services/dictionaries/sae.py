"""The TopK sparse autoencoder, shared by both modalities.

    z     = TopK(ReLU((e - b_m) W_enc + b))
    e_hat = z D + b_m

with one pre-bias b_m a modality, because image and text embeddings sit on two cones (the modality gap) and a
single mean would spend features on telling them apart; and unit decoder rows d_j, so that activations are
comparable.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from services.dictionaries.base import Dictionary, Modality, SparseRow, register
from services.errors import ManifestError


def topk_relu(pre: Float[Tensor, "batch n"], k: int) -> Float[Tensor, "batch n"]:
    """Return TopK(ReLU(pre)): the k largest positive entries of each row, zero elsewhere."""
    values, indices = pre.topk(min(k, pre.shape[-1]), dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def batch_topk_relu(pre: Float[Tensor, "batch n"], k: int) -> Float[Tensor, "batch n"]:
    """Return the k * batch largest positive entries of the whole batch, zero elsewhere (BatchTopK).

    Source: Bussmann et al., "BatchTopK Sparse Autoencoders" (2024). For training only: a sample's features
    depend on its neighbours.
    """
    return topk_relu(pre.reshape(1, -1), k * pre.shape[0]).reshape(pre.shape)


@register("sae")
class SAE(Dictionary):
    """A TopK sparse autoencoder with a pre-bias a modality.

    Parameters
    ----------
    embed_dim : int
        d.
    n_features : int
        n, usually 8d to 32d.
    k : int
        Features kept for one embedding.
    activation : {"topk", "batch-topk", "jump-relu"}
        With ``batch-topk`` the k largest are shared over a training batch, and a fixed `threshold` takes
        their place in eval mode, so that a served result does not depend on its batch. With ``jump-relu``
        every feature has a threshold of its own, and k counts for nothing: for dictionaries made elsewhere
        (Rajamanoharan et al., arXiv 2407.14435).
    scaled : bool
        Whether the k that were chosen are then multiplied by a `scale`: for dictionaries made elsewhere that
        choose by the activations of decoder rows that are not of length 1.

    Attributes
    ----------
    encoder : Parameter, shape (d, n)
        W_enc.
    encoder_bias : Parameter, shape (n,)
        b.
    decoder : Parameter, shape (n, d)
        D, unit rows.
    pre_bias_image, pre_bias_text : Parameter, shape (d,)
        b_m.
    threshold : buffer, scalar, or shape (n,) for ``jump-relu``
        Used by ``batch-topk`` in eval mode and by ``jump-relu``: activations at or under it are zero.
    scale : buffer, shape (n,)
        Positive; only where `scaled`.
    """

    threshold: Tensor
    scale: Tensor

    def __init__(
        self, embed_dim: int, n_features: int, k: int, activation: str = "topk", scaled: bool = False
    ) -> None:
        super().__init__(embed_dim, n_features)
        if activation not in ("topk", "batch-topk", "jump-relu"):
            raise ManifestError(f"activation must be topk, batch-topk or jump-relu, not {activation!r}")
        if not 1 <= k <= n_features:
            raise ManifestError(f"k must be between 1 and n_features = {n_features}, not {k}")
        if scaled and activation != "topk":
            raise ManifestError(
                "only the activations of topk are scaled: those of others go into the encoder"
            )
        self.k = k
        self.activation = activation
        self.scaled = scaled
        rows = nn.functional.normalize(torch.randn(n_features, embed_dim), dim=-1)
        self.decoder = nn.Parameter(rows)
        # The encoder starts as the decoder's transpose: it keeps most features alive early in training.
        self.encoder = nn.Parameter(rows.T.clone().contiguous())
        self.encoder_bias = nn.Parameter(torch.zeros(n_features))
        self.pre_bias_image = nn.Parameter(torch.zeros(embed_dim))
        self.pre_bias_text = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("threshold", torch.zeros((n_features,) if activation == "jump-relu" else ()))
        if scaled:
            self.register_buffer("scale", torch.ones(n_features))

    def pre_bias(self, modality: Modality) -> Float[Tensor, " d"]:
        """Return b_m."""
        return self.pre_bias_image if modality is Modality.IMAGE else self.pre_bias_text

    def pre_activations(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return (e - b_m) W_enc + b."""
        return torch.addmm(self.encoder_bias, e - self.pre_bias(modality), self.encoder)

    def activate(self, pre: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Return the sparse, non-negative activations of pre-activations `pre`."""
        if self.activation == "topk":
            z = topk_relu(pre, self.k)
            return z * self.scale if self.scaled else z
        if self.training and self.activation == "batch-topk":
            return batch_topk_relu(pre, self.k)
        return torch.where(pre > self.threshold, pre, 0.0).relu()

    def encode(self, e: Float[Tensor, "batch d"], modality: Modality) -> Float[Tensor, "batch n"]:
        """Return z = TopK(ReLU((e - b_m) W_enc + b))."""
        return self.activate(self.pre_activations(e, modality))

    def encode_sparse(self, e: Float[Tensor, "batch d"], modality: Modality) -> list[SparseRow]:
        """Return the non-zero entries of `encode`: the k largest pre-activations, those that are positive."""
        if self.activation != "topk":
            return super().encode_sparse(e, modality)
        top = self.pre_activations(e, modality).topk(self.k, dim=-1)
        indices, order = top.indices.sort(dim=-1)
        kept = top.values.gather(-1, order)
        if self.scaled:
            kept = kept * self.scale[indices]
        values = kept.detach().to("cpu", torch.float32).numpy()
        columns = indices.to("cpu", torch.int32).numpy()
        return [
            SparseRow(column[value > 0], value[value > 0])
            for column, value in zip(columns, values, strict=True)
        ]

    def decode(self, z: Float[Tensor, "batch n"], modality: Modality) -> Float[Tensor, "batch d"]:
        """Return e_hat = z D + b_m."""
        return torch.addmm(self.pre_bias(modality), z, self.decoder)

    def decoder_rows(self, modality: Modality) -> Float[Tensor, "n d"]:
        """Return D, the same for both modalities."""
        return self.decoder

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to unit length, in place."""
        self.decoder.copy_(nn.functional.normalize(self.decoder, dim=-1))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "embed_dim": self.embed_dim,
            "n_features": self.n_features,
            "k": self.k,
            "activation": self.activation,
            # Only where it is so: other dictionaries are as they were.
            **({"scaled": True} if self.scaled else {}),
        }
