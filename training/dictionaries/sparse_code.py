"""Encode and decode the k chosen features of each embedding, with gradients that cost k a row and not n.

The gradients of a dense encoder and decoder multiply matrices of which all but k of n entries a row are zero. On a
processor these two products are most of a training step; here each is a weighted sum of the rows that chose a feature.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Embeddings whose decoder rows are gathered at once, k rows of d each: enough to be quick, few enough for the cache.
GATHER = 64


def sum_by_feature(
    rows: Float[Tensor, "batch d"],
    indices: Int[Tensor, "batch k"],
    weights: Float[Tensor, "batch k"],
    n_features: int,
) -> Float[Tensor, "n d"]:
    """Return for each feature the weighted sum of the rows that chose it, Z^T rows for the sparse Z [batch, n].

    Parameters
    ----------
    rows : Tensor
        One a sample, float32.
    indices, weights : Tensor
        The entries of Z, int64 and float32; a row's indices are distinct.
    n_features : int
        n.
    """
    features = indices.reshape(-1)
    order = features.argsort()
    count = torch.bincount(features, minlength=n_features)
    return F.embedding_bag(
        order // indices.shape[1],
        rows,
        count.cumsum(0) - count,
        per_sample_weights=weights.reshape(-1)[order],
        mode="sum",
    )


class _Select(torch.autograd.Function):
    """The pre-activations of chosen features, already computed, as a function of the encoder and its bias."""

    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, bias: Tensor, x: Tensor, indices: Tensor, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, indices)
        ctx.n_features = len(bias)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, indices = ctx.saved_tensors
        encoder = sum_by_feature(x, indices, gradient, ctx.n_features).T.contiguous()
        bias = gradient.new_zeros(ctx.n_features).index_add_(0, indices.reshape(-1), gradient.reshape(-1))
        return encoder, bias, None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of chosen decoder rows."""

    @staticmethod
    def forward(ctx: Any, decoder: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(decoder, values, indices)
        return F.embedding_bag(indices, decoder, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        decoder, values, indices = ctx.saved_tensors
        gradient = gradient.contiguous()
        rows = sum_by_feature(gradient, indices, values, len(decoder))
        along = [
            torch.bmm(decoder[chosen], back[:, :, None])[:, :, 0]
            for chosen, back in zip(indices.split(GATHER), gradient.split(GATHER), strict=True)
        ]
        return rows, torch.cat(along), None


def select(
    encoder: Float[Tensor, "d n"],
    bias: Float[Tensor, " n"],
    x: Float[Tensor, "batch d"],
    indices: Int[Tensor, "batch k"],
    values: Float[Tensor, "batch k"],
) -> Float[Tensor, "batch k"]:
    """Return `values` = (x W + b) at `indices` as a function of W and b; no gradient flows to `x`."""
    chosen: Tensor = _Select.apply(encoder, bias, x, indices, values)
    return chosen


def combine(
    decoder: Float[Tensor, "n d"], values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch d"]:
    """Return z D for the sparse z that has `values` at `indices`."""
    summed: Tensor = _Combine.apply(decoder, values, indices)
    return summed
