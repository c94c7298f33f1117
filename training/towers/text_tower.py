"""Teach the text transformer the caption embeddings that the image tower learnt with.

Distillation: the transformer reads a caption in a template, or two captions in a row, and must embed it where the
sum of word vectors lies (`training.towers.caption_words`). It starts as such a sum itself, so minutes suffice.
"""

from __future__ import annotations

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from training.towers.caption_words import CaptionWords
from training.towers.contrastive import encode_text


@torch.no_grad()
def start_as_a_sum(model: open_clip.CLIP, words: CaptionWords) -> None:
    """Set the text tower to a near-uniform average of word vectors.

    Token embeddings are the word vectors in their leading principal directions (the transformer is narrower than
    the joint embedding); the first block's attention looks at all tokens alike and passes them on unchanged; the
    projection leads back. Start and end tokens are zero: their constant share would make all texts alike.
    """
    width = model.token_embedding.weight.shape[1]
    vectors = words.vectors.weight
    _, directions = torch.linalg.eigh(vectors.T @ vectors)
    basis = directions[:, -width:]
    embedded = vectors @ basis
    unused = embedded.std() * 0.1
    model.token_embedding.weight.normal_(std=float(unused))
    model.token_embedding.weight[torch.from_numpy(words.vocabulary).to(embedded.device)] = embedded
    model.token_embedding.weight[-2:] = 0.0
    model.positional_embedding.mul_(0.3)
    attention = model.transformer.resblocks[0].attn
    identity = torch.eye(width, device=embedded.device)
    attention.in_proj_weight[: 2 * width] *= 0.3
    attention.in_proj_weight[2 * width :] = identity
    attention.in_proj_bias.zero_()
    attention.out_proj.weight.copy_(identity)
    attention.out_proj.bias.zero_()
    model.text_projection.copy_(basis.T)


class TextDistiller:
    """Fits a text tower to caption embeddings.

    Parameters
    ----------
    model : open_clip.CLIP
        Its text tower is trained in place.
    words : CaptionWords
        The teacher; it stays as it is.
    weights : np.ndarray
        Share of each of the teacher's captions among the samples, float64 [n].
    templates : tuple[str, ...]
        Each with one ``{}``.
    steps, batch : int
        Optimiser steps, and texts a step.
    rate : float
        Peak learning rate; it rises for 5% of the steps and then falls linearly.
    seed : int
        Of the samples.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        words: CaptionWords,
        weights: np.ndarray,
        templates: tuple[str, ...],
        steps: int,
        batch: int,
        rate: float,
        seed: int,
    ) -> None:
        self.model, self.words, self.templates = model, words, templates
        self.steps, self.batch, self.peak = steps, batch, rate
        self._shares = weights / weights.sum()
        self._rng = np.random.default_rng(seed)
        self._tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
        visual = {id(p) for p in model.visual.parameters()}
        parameters = [p for p in model.parameters() if id(p) not in visual and p is not model.logit_scale]
        self.optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.step = 0

    def sample(self) -> tuple[list[str], Float[Tensor, "batch d"]]:
        """Draw texts and what they should embed to; a quarter of them are two captions in a row."""
        rows = self._rng.choice(len(self._shares), self.batch + self.batch // 4, p=self._shares)
        captions = self.words.captions[rows]
        with torch.no_grad():
            targets = self.words(rows)
        joined = self.batch // 4
        texts = [
            f"{first} {second}" for first, second in zip(captions[:joined], captions[-joined:], strict=True)
        ]
        texts += captions[joined : self.batch].tolist()
        both = F.normalize(targets[:joined] + targets[-joined:], dim=-1)
        picked = self._rng.integers(len(self.templates), size=self.batch)
        texts = [self.templates[p].format(text) for p, text in zip(picked, texts, strict=True)]
        return texts, torch.cat([both, targets[joined : self.batch]])

    def train_step(self) -> float:
        """Take one optimiser step and return the mean of 1 - cosine."""
        texts, targets = self.sample()
        progress = self.step / self.steps
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * min(1.0, (progress + 1e-3) / 0.05, (1.0 - progress) / 0.95)
        embeddings = encode_text(self.model, self._tokenize(texts).to(targets.device))
        loss = (1.0 - (embeddings * targets).sum(-1)).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        return float(loss.detach())
