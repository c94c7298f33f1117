"""The parts of the diffusion: the UNet, its optimisers, the noise of embeddings, the schedule and the solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from jaxtyping import Float, Int
from torch import Tensor, nn

from training.compute import CPU
from training.towers.muon import Muon

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
        Decoupled.
    channels : tuple[int, ...]
        Widths at 16, 8, ... positions a side, multiples of 32.
    embedding_alone, prompt_alone, nothing : float
        How often the UNet gets the embedding without a prompt, the prompt without an embedding, and neither, which is
        what guidance subtracts; else it gets both. The embedding alone is what steering changes, so it has the largest
        share.
    image_share : float
        How often the embedding is the drawing's; else it is its caption's.
    sibling_share : float
        How often the drawing's embedding is that of another drawing of the same caption, so that the embedding is read
        for what it says and not for which drawing it is.
    noisy_share : float
        How often the embedding is noised, by a level up to `noisy_level` of 1,000.
    mixed_share : float
        How often the embedding is moved towards another's, by any share of the way, as steering moves it. The drawing
        that belongs to such an embedding is known to a teacher alone (`training.diffusion.transfer`).
    average : float
        Decay of the weights' moving average, a step.
    """

    steps: int = 3640
    batch: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.01
    warm_up: int = 50
    decay: float = 0.35
    channels: tuple[int, ...] = (128, 256)
    embedding_alone: float = 0.50
    prompt_alone: float = 0.12
    nothing: float = 0.10
    image_share: float = 0.60
    sibling_share: float = 0.20
    noisy_share: float = 0.25
    noisy_level: int = 300
    mixed_share: float = 0.0
    average: float = 0.9995
    seed: int = 0


def build_unet(
    channels: tuple[int, ...], latent: int, side: int, width: int, embed_dim: int
) -> UNet2DConditionModel:
    """Return a UNet with cross-attention everywhere but at full resolution; each residual branch starts at zero.

    Parameters
    ----------
    channels : tuple[int, ...]
        Widths, one a resolution, multiples of 16.
    latent, side : int
        Channels and side of the latent.
    width : int
        Of the text tower's token states.
    embed_dim : int
        d of the joint embedding; the class embedding takes it and as many numbers of the noise level.
    """
    attends = [False, *[True] * (len(channels) - 1)]
    model = UNet2DConditionModel(
        sample_size=side,
        in_channels=latent,
        out_channels=latent,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=32 if channels[0] % 32 == 0 else 16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * embed_dim,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=3 * channels[0],
    )
    for name, module in model.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def build_optimisers(unet: UNet2DConditionModel, settings: DiffusionSettings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and convolutions within, AdamW for all else: ends, norms, biases.

    Parameters that need no gradient are left out.
    """
    ends = ("conv_in", "conv_out", "class_embedding", "time_embedding.linear_1")
    trained = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if p.ndim > 1 and not name.startswith(ends)]
    known = {id(p) for p in inner}
    rest = [p for _, p in trained if id(p) not in known]
    decays = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    return [Muon(inner, **decays), torch.optim.AdamW(rest, betas=(0.9, 0.99), **decays)]


class EmbeddingNoiser:
    """Noises joint embeddings as Stable unCLIP pipelines do, and appends the level.

    Parameters
    ----------
    embeddings : Tensor
        Raw embeddings whose mean and deviation define the unit of noise, float32 [n, d].
    device : torch.device
        Where it is called.
    """

    def __init__(self, embeddings: Float[Tensor, "n d"], device: torch.device = CPU) -> None:
        self.normaliser = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1]).requires_grad_(False)
        self.normaliser.mean.copy_(embeddings.mean(0))
        self.normaliser.std.copy_(embeddings.std(0).clamp(min=1e-4))
        self.normaliser.to(device)
        self.scheduler = DDPMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "prediction_type"})

    def __call__(
        self, embeddings: Float[Tensor, "n d"], levels: Int[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return noised raw embeddings and the sinusoids of their levels, each float32 [n, d]."""
        noise = torch.randn(embeddings.shape, generator=generator, device=embeddings.device)
        noised = self.scheduler.add_noise(self.normaliser.scale(embeddings), noise, levels)
        sinusoids = get_timestep_embedding(
            levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.normaliser.unscale(noised), sinusoids


def serving_solver() -> DPMSolverMultistepScheduler:
    """Return the solver that pictures are made with: DPM-Solver++ of second order (Lu et al., 2022)."""
    return DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing", solver_order=2)
