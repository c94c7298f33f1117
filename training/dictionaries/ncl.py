"""Fit a non-negative contrastive dictionary: an MLP shared by both modalities, symmetric InfoNCE on its ReLU output.

Source: Wang et al., "Non-negative Contrastive Learning" (ICLR 2024). The decoder is fitted afterwards by ridge.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.dictionaries import NCL, Modality
from training.dictionaries.sae import EmbeddingPairs, info_nce, same_rows


@dataclass(frozen=True)
class NCLSettings:
    """Hyperparameters of one run.

    Parameters
    ----------
    n_features, hidden_dim : int
        Sizes of the MLP's output and hidden layer.
    steps, batch : int
        Optimiser steps, and pairs a step.
    lr : float
        Peak rate of AdamW; falls linearly to zero over the last half.
    temperature : float
        On cosines.
    seed : int
        Of initialisation and batches.
    """

    n_features: int = 1024
    hidden_dim: int = 512
    steps: int = 300
    batch: int = 256
    lr: float = 1e-3
    temperature: float = 0.07
    seed: int = 0


def train_ncl(
    pairs: EmbeddingPairs, settings: NCLSettings, label: str = "", tell: Callable[[float], None] | None = None
) -> NCL:
    """Train and fit the decoder; returns the dictionary in eval mode.

    Progress is printed, or told step by step where `tell` is given.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    ncl = NCL(pairs.images.shape[1], settings.n_features, settings.hidden_dim)
    optimiser = torch.optim.AdamW(ncl.mlp.parameters(), lr=settings.lr, weight_decay=1e-4)
    started = time.monotonic()
    for step in range(settings.steps):
        images, texts = pairs.batch(settings.batch, generator)
        a, b = ncl.encode(images, Modality.IMAGE), ncl.encode(texts, Modality.TEXT)
        loss = info_nce(a, b, settings.temperature, same_rows(texts))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 20, 2 * (1 - step / settings.steps))
        optimiser.step()
        if tell is not None:
            tell(1.0)
        elif (step + 1) % max(1, settings.steps // 4) == 0:
            seconds = time.monotonic() - started
            print(f"{label} step {step + 1} loss {float(loss.detach()):.3f} {seconds:.0f} s", flush=True)
    # A few thousand pairs fix 1,024 ridge coefficients; all of them would only take longer.
    some = torch.randperm(len(pairs.images), generator=generator)[:8000]
    images, texts = pairs.sides()
    ncl.eval().fit_decoder(images[some], texts[some])
    return ncl.requires_grad_(False)
