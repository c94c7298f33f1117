"""The contrastive loss of the towers, and text embeddings at the cost of the text's own length."""

from __future__ import annotations

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Float[Tensor, "batch d"]:
    """Return unit text embeddings of tokenised texts, int64 [batch, context].

    Texts are encoded in two groups, short and long, each cut to its longest text: causal attention makes that
    exact, and most captions are a third of the longest.
    """
    ends = tokens.argmax(1)
    order = ends.argsort()
    parts = []
    for group in order.chunk(2):
        length = int(ends[group].max()) + 1
        x = model.token_embedding(tokens[group, :length]) + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        parts.append(model.ln_final(x)[torch.arange(len(group), device=x.device), ends[group]])
    pooled = torch.cat(parts)[order.argsort()]
    return F.normalize(pooled @ model.text_projection, dim=-1)


def contrastive_loss(
    images: Float[Tensor, "batch d"],
    texts: Float[Tensor, "captions d"],
    bank: Float[Tensor, "others d"],
    target: Tensor,
    ignore: Bool[Tensor, "batch captions_and_others"],
    scale: Tensor,
) -> Tensor:
    """Return the mean of the two cross-entropies described in the docstring of `training.clip`.

    Parameters
    ----------
    images, texts, bank : Tensor
        Unit embeddings of the batch's images, of its distinct captions, and of other captions.
    target : Tensor
        Caption index of each image, int64 [batch].
    ignore : Tensor
        Image-caption pairs that are neither positive nor negative.
    scale : Tensor
        Inverse temperature.
    """
    logits = scale * images @ torch.cat([texts, bank]).T
    logits = logits.masked_fill(ignore, float("-inf"))
    to_text = F.cross_entropy(logits, target)
    positive = F.one_hot(target, len(texts)).float().T
    log_share = F.log_softmax(logits[:, : len(texts)].T, dim=1)
    # Where a pair is ignored both factors are void: 0 * -inf must count as 0.
    to_image = -(torch.where(positive > 0, log_share, 0.0) * positive).sum(1) / positive.sum(1)
    return (to_text + to_image.mean()) / 2
