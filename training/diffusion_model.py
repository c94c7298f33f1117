"""The parts of the diffusion: the UNet, its optimisers, the noise of embeddings, the schedule and the solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from jaxtyping import Float, Int
from torch import Tensor

from training.muon import Muon

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class DiffusionSettings:
    """Hyperparameters of a run.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps, and drawings a step.
    lr : float
        Peak learning rate; rises over `warm_up` steps, falls linearly over the last `decay` of them.
    weight_decay : float
        Of AdamW.
    channels : tuple[int, ...]
        Widths at 8, 4, ... positions a side.
    muon : int
        1: Muon for the inner weights; 0: AdamW for all.
    text_share, zero_share : float
        How often the joint embedding is the caption's, and zeros; else it is the drawing's.
    no_prompt : float
        How often the prompt is empty; half of the samples without an embedding have none either, which is what
        guidance subtracts.
    noisy_share : float
        How often the embedding is noised, by a level up to `noisy_level` of 1,000.
    average : float
        Decay of the weights' moving average, a step.
    """

    steps: int = 3600
    batch: int = 96
    lr: float = 2e-3
    weight_decay: float = 0.01
    warm_up: int = 50
    decay: float = 0.4
    channels: tuple[int, ...] = (64, 128)
    muon: int = 1
    text_share: float = 0.35
    zero_share: float = 0.15
    no_prompt: float = 0.15
    noisy_share: float = 0.15
    noisy_level: int = 400
    average: float = 0.998
    seed: int = 0


def build_unet(channels: tuple[int, ...], latent: int, width: int, embed_dim: int) -> UNet2DConditionModel:
    """Return a randomly initialised UNet: cross-attention everywhere but at full resolution.

    Parameters
    ----------
    channels : tuple[int, ...]
        Widths, one a resolution.
    latent : int
        Channels of the latent.
    width : int
        Of the text tower's token states.
    embed_dim : int
        d of the joint embedding; the class embedding takes it and as many numbers of the noise level.
    """
    attends = [False, *[True] * (len(channels) - 1)]
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent,
        out_channels=latent,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * embed_dim,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=512,
    )


def build_optimisers(unet: UNet2DConditionModel, settings: DiffusionSettings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and convolutions within, AdamW for all else: ends, norms, biases."""
    ends = ("conv_in", "conv_out", "class_embedding", "time_embedding.linear_1")
    inner = [p for name, p in unet.named_parameters() if p.ndim > 1 and not name.startswith(ends)]
    if not settings.muon:
        inner = []
    known = {id(p) for p in inner}
    rest = [p for p in unet.parameters() if id(p) not in known]
    decays = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), **decays)
    return [Muon(inner, **decays), adam] if inner else [adam]


class EmbeddingNoiser:
    """Noises joint embeddings as Stable unCLIP pipelines do, and appends the level.

    Parameters
    ----------
    embeddings : Tensor
        Raw embeddings whose mean and deviation define the unit of noise, float32 [n, d].
    """

    def __init__(self, embeddings: Float[Tensor, "n d"]) -> None:
        self.normaliser = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1]).requires_grad_(False)
        self.normaliser.mean.copy_(embeddings.mean(0))
        self.normaliser.std.copy_(embeddings.std(0).clamp(min=1e-4))
        self.scheduler = DDPMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "prediction_type"})

    def __call__(
        self, embeddings: Float[Tensor, "n d"], levels: Int[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return noised raw embeddings and the sinusoids of their levels, each float32 [n, d]."""
        noise = torch.randn(embeddings.shape, generator=generator)
        noised = self.scheduler.add_noise(self.normaliser.scale(embeddings), noise, levels)
        sinusoids = get_timestep_embedding(
            levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.normaliser.unscale(noised), sinusoids


def serving_solver() -> DPMSolverMultistepScheduler:
    """Return the solver that pictures are made with: DPM-Solver++ of second order (Lu et al., 2022)."""
    return DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing", solver_order=2)
