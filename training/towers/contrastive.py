"""The contrastive losses of the towers, and text embeddings at the cost of the text's own length."""

from __future__ import annotations

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def encode_text(model: open_clip.CLIP, tokens: Int[Tensor, "batch context"]) -> Float[Tensor, "batch d"]:
    """Return unit text embeddings of tokenized texts.

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
    captions: Float[Tensor, "captions d"],
    target: Int[Tensor, " batch"],
    ignore: Bool[Tensor, "batch captions"],
    scale: Tensor,
    text_weight: float,
) -> Tensor:
    """Return CLIP's two cross-entropies: of an image over all captions, of a caption over the batch's images.

    Parameters
    ----------
    images, captions : Tensor
        Unit embeddings of the batch's images, and of every caption that may be an answer.
    target : Tensor
        The caption of each image.
    ignore : Tensor
        Image-caption pairs that are neither positive nor negative; never a target.
    scale : Tensor
        Inverse temperature.
    text_weight : float
        Weight of the caption's cross-entropy; a caption shares its target evenly among its images.
    """
    logits = (scale * images @ captions.T).masked_fill(ignore, float("-inf"))
    to_text = F.cross_entropy(logits, target)
    present, inverse = target.unique(return_inverse=True)
    positive = F.one_hot(inverse, len(present)).T.float()
    log_share = F.log_softmax(logits[:, present].T, dim=1)
    # Where a pair is ignored both factors are void: 0 * -inf must count as 0.
    to_image = -(torch.where(positive > 0, log_share, 0.0) * positive).sum(1) / positive.sum(1)
    return to_text + text_weight * to_image.mean()


def supervised_contrastive(
    projections: Float[Tensor, "batch d"], labels: Int[Tensor, " batch"], temperature: float
) -> Tensor:
    """Return the contrastive loss whose positives are the other images of the same label (Khosla et al., 2020).

    Parameters
    ----------
    projections : Tensor
        Unit vectors, one an image.
    labels : Tensor
        The concept of each image; an image whose concept no other has is only a negative.
    temperature : float
        Of the softmax over all other images.
    """
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None, :]) & others
    logits = (projections @ projections.T / temperature).masked_fill(~others, float("-inf"))
    log_share = torch.where(positive, F.log_softmax(logits, dim=1), 0.0)
    count = positive.sum(1)
    answered = count > 0
    return -(log_share.sum(1)[answered] / count[answered]).mean()


def two_caption_loss(
    images: Float[Tensor, "batch d"],
    first: Float[Tensor, " d"],
    second: Float[Tensor, " d"],
    is_second: Float[Tensor, " batch"],
    scale: Tensor,
) -> Tensor:
    """Return the cross-entropy of two captions alone.

    Among thousands of captions, the two of one profession ("man pilot", "woman pilot") are told apart last; on
    their own they are not.
    """
    return F.binary_cross_entropy_with_logits(scale * images @ (second - first), is_second)
