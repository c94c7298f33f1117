"""Train the embedded text-to-image model: latent diffusion, steered by the bundle's own towers.

``python -m training.diffusion`` trains, ``--resume`` goes on from the last checkpoint (``--steps`` may change: the
learning rate follows the share that is done); ``python -m training.diffusion_export`` makes the pipeline of it.

The model is Stable unCLIP (Ramesh et al., 2022; Rombach et al., 2022) at the size that an hour on one core can train:
a UNet on 8x8 latents sees the caption's token states by cross-attention and a joint embedding by its class embedding,
which scales and shifts every block. The joint embedding is the drawing's, its caption's, or zeros, so that text
alone, picture alone or both steer it; the caption is dropped now and then for guidance (Ho and Salimans, 2022).
v-prediction (Salimans and Ho, 2022) on the cosine schedule; the exported weights are a moving average.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from jaxtyping import Float, Int
from torch import Tensor, nn

from training.autoencoder import DEFAULT_OUT as AUTOENCODER
from training.autoencoder import sheet
from training.corpus.build import DEFAULT_DIR
from training.diffusion_data import Conditions, DiffusionData
from training.embeddings import DEFAULT_CLIP
from training.embeddings import DEFAULT_OUT as EMBEDDINGS
from training.pairs import Corpus

DEFAULT_OUT = Path("work/diffusion")
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
SHEET_PROMPTS = (
    "red apple", "dog face", "woman firefighter", "sun", "red heart", "grinning face", "man astronaut dark skin tone",
    "automobile", "flag germany", "cat face", "pizza", "tulip", "thumbs up", "crown", "fish", "soccer ball",
)  # fmt: skip


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

    steps: int = 5000
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warm_up: int = 100
    decay: float = 0.4
    channels: tuple[int, ...] = (64, 128)
    text_share: float = 0.35
    zero_share: float = 0.15
    no_prompt: float = 0.15
    noisy_share: float = 0.15
    noisy_level: int = 400
    average: float = 0.997
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


class DiffusionTrainer:
    """Holds the model, the optimiser and the data of one run.

    Parameters
    ----------
    data : DiffusionData
        Latents and conditions.
    settings : DiffusionSettings
        Hyperparameters.
    folder : Path
        Where checkpoints, sheets and the log go.
    """

    def __init__(self, data: DiffusionData, settings: DiffusionSettings, folder: Path) -> None:
        torch.manual_seed(settings.seed)
        self.data, self.settings, self.folder = data, settings, folder
        conditions = data.conditions
        self.unet = build_unet(
            settings.channels, data.latents.shape[1], conditions.states.shape[-1], conditions.images.shape[1]
        ).to(memory_format=torch.channels_last)
        self.average = {k: v.clone() for k, v in self.unet.state_dict().items()}
        self.equaliser = conditions.equaliser()
        self.noiser = EmbeddingNoiser(torch.cat([conditions.images, conditions.texts[0]]))
        self.schedule = DDPMScheduler(**SCHEDULE)
        self.optimiser = torch.optim.AdamW(
            self.unet.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        # A concept in six skin tones is seen more often than one without, but not six times.
        counts = torch.bincount(conditions.caption, minlength=len(conditions.captions)).float()
        self.weights = counts[conditions.caption].rsqrt()
        self.step = 0

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step."""
        progress = self.step / self.settings.steps
        return min(1.0, (self.step + 1) / self.settings.warm_up, (1.0 - progress) / self.settings.decay)

    def class_vector(self, embeddings: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the UNet's class labels while it trains: the equalised noised embedding, and its level."""
        noised, sinusoids = self.noiser(embeddings, levels, generator)
        return torch.cat([noised @ self.equaliser, sinusoids], 1)

    def conditioning(
        self, conditions: Conditions, index: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw what the UNet is told about each drawing of `index`.

        Returns
        -------
        tuple[Tensor, Tensor]
            Token states [n, context, width] and class labels [n, 2 d], float32.
        """
        s, n = self.settings, len(index)
        caption = conditions.caption[index]
        kind, template, prompt, noisy = torch.rand(4, n, generator=generator)
        templates = len(conditions.texts)
        # As often the bare caption as all templates together: prompts are mostly bare.
        chosen = ((template * 2 - 1).clamp(min=0) * templates).long()
        from_text = kind < s.text_share
        embeddings = torch.where(
            from_text.unsqueeze(1), conditions.texts[chosen, caption], conditions.images[index]
        )
        levels = torch.randint(0, s.noisy_level, (n,), generator=generator) * (noisy < s.noisy_share)
        labels = self.class_vector(embeddings, levels, generator)
        zero = kind > 1 - s.zero_share
        labels = torch.where(zero.unsqueeze(1), 0.0, labels)
        empty = prompt < torch.where(zero, 0.5, s.no_prompt)
        states = torch.where(empty.view(-1, 1, 1), conditions.empty, conditions.states[caption]).float()
        return states, labels

    def loss(self, latents: Tensor, states: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of v at times drawn evenly over the schedule."""
        n = len(latents)
        # Stratified: the loss depends on the time more than on anything else.
        times = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = self.schedule.add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
        found = self.unet(noisy, times, states, class_labels=labels).sample
        return F.mse_loss(found, self.schedule.get_velocity(latents, noise, times))

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        s = self.settings
        self.unet.train()
        index = torch.multinomial(self.weights, s.batch, generator=self.generator)
        states, labels = self.conditioning(self.data.conditions, index, self.generator)
        loss = self.loss(self.data.latents[index], states, labels, self.generator)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = s.lr * self.rate()
        self.optimiser.step()
        self.step += 1
        decay = min(s.average, self.step / (self.step + 10))
        for name, value in self.unet.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    def averaged(self) -> UNet2DConditionModel:
        """Return a UNet with the averaged weights, which takes equalised embeddings."""
        model = UNet2DConditionModel.from_config(self.unet.config)
        model.load_state_dict(self.average)
        return model.eval().requires_grad_(False)

    def exported(self) -> UNet2DConditionModel:
        """Return a UNet with the averaged weights, which takes raw embeddings as pipelines give them."""
        model = self.averaged()
        first, d = model.class_embedding.linear_1, len(self.equaliser)
        first.weight[:, :d] = (first.weight[:, :d].double() @ self.equaliser.T.double()).float()
        return model

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return the averaged model's loss on held-out drawings, always with the same draws."""
        generator = torch.Generator().manual_seed(1)
        trained, self.unet = self.unet, self.averaged()
        total = 0.0
        index = torch.arange(0, len(self.data.held_out_latents), 4)
        for part in index.split(64):
            states, labels = self.conditioning(self.data.held_out, part, generator)
            latents = self.data.held_out_latents[part]
            total += float(self.loss(latents, states, labels, generator)) * len(part)
        self.unet = trained
        return {"loss": total / len(index)}

    @torch.inference_mode()
    def sample(
        self, captions: list[str], steps: int = 12, guidance: float = 3.0, seed: int = 0
    ) -> Float[Tensor, "n latent 8 8"]:
        """Return latents for captions of the corpus, from their text embeddings and token states."""
        conditions, generator = self.data.conditions, torch.Generator().manual_seed(seed)
        where = torch.from_numpy(np.searchsorted(conditions.captions, captions))
        zeros = torch.zeros(len(where), dtype=torch.int64)
        labels = self.class_vector(conditions.texts[0, where], zeros, generator)
        labels = torch.cat([torch.zeros_like(labels), labels])
        states = torch.cat([conditions.empty.expand(len(where), -1, -1), conditions.states[where]]).float()
        solver, model = serving_solver(), self.averaged()
        solver.set_timesteps(steps)
        latents = torch.randn((len(where), *self.data.latents.shape[1:]), generator=generator)
        for time_step in solver.timesteps:
            both = model(torch.cat([latents] * 2), time_step, states, class_labels=labels).sample
            without, told = both.chunk(2)
            latents = solver.step(without + guidance * (told - without), time_step, latents).prev_sample
        return latents

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "fingerprint": self.data.conditions.fingerprint,
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint.

        Raises
        ------
        ValueError
            Where it was trained on other towers.
        """
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        if state["fingerprint"] != self.data.conditions.fingerprint:
            raise ValueError("the checkpoint was trained on other towers; train anew")
        self.unet.load_state_dict(state["unet"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def write_sheet(self, decode) -> None:
        """Write pictures of `SHEET_PROMPTS`, two seeds each."""
        known = set(self.data.conditions.captions)
        prompts = [p for p in SHEET_PROMPTS if p in known]
        rows = [decode(self.sample(prompts, seed=seed)) for seed in (0, 1)]
        sheet(
            [row[i : i + 8] for i in range(0, len(prompts), 8) for row in rows], self.folder / "samples.png"
        )

    def run(self, validate_every: int, decode) -> None:
        """Train to the end, with progress, checkpoints, validation and sheets.

        Parameters
        ----------
        validate_every : int
            Steps between validations, sheets and checkpoints.
        decode : callable
            From latents to images in [-1, 1].
        """
        started, first = time.monotonic(), self.step
        recent: list[float] = []
        while self.step < self.settings.steps:
            recent.append(self.train_step())
            done = self.step == self.settings.steps
            if self.step % 25 == 0 or done:
                pace = (time.monotonic() - started) / (self.step - first)
                print(
                    f"step {self.step}/{self.settings.steps} loss {np.mean(recent[-100:]):.4f} "
                    f"{self.settings.batch / pace:.0f} drawings/s, "
                    f"{(self.settings.steps - self.step) * pace / 60:.0f} min left",
                    flush=True,
                )
            if self.step % validate_every == 0 or done:
                self.save()
                figures = {"step": self.step, "minutes": (time.monotonic() - started) / 60, **self.validate()}
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(figures) + "\n")
                print(figures, flush=True)
                self.write_sheet(decode)


def serving_solver() -> DPMSolverMultistepScheduler:
    """Return the solver that pictures are made with: DPM-Solver++ of second order (Lu et al., 2022)."""
    return DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing", solver_order=2)


def load_trainer(arguments: argparse.Namespace, settings: DiffusionSettings) -> DiffusionTrainer:
    """Return a trainer on the paths of the command line."""
    corpus = Corpus.load(arguments.corpus)
    data = DiffusionData.build(
        corpus,
        arguments.clip,
        arguments.embeddings,
        arguments.autoencoder / "vae",
        arguments.out / "latents.npz",
    )
    return DiffusionTrainer(data, settings, arguments.out)


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where everything is."""
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--clip", type=Path, default=DEFAULT_CLIP, help="folder of the towers")
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS, help="by the same towers")
    parser.add_argument("--autoencoder", type=Path, default=AUTOENCODER)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def main() -> None:
    """Train from the command line."""
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_paths(parser)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--validate-every", type=int, default=500)
    defaults = asdict(DiffusionSettings())
    options = [name for name in defaults if name != "channels"]
    for name in options:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(defaults[name]), default=defaults[name])
    parser.add_argument("--channels", type=int, nargs="+", default=list(defaults["channels"]))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {name: getattr(arguments, name) for name in options}
    settings = DiffusionSettings(**chosen, channels=tuple(arguments.channels))
    trainer = load_trainer(arguments, settings)
    (arguments.out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    if arguments.resume:
        trainer.resume()

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        # Read anew: its decoder may still be training.
        vae = AutoencoderKL.from_pretrained(arguments.autoencoder / "vae")
        return vae.decode(latents / vae.config.scaling_factor).sample

    trainer.run(arguments.validate_every, decode)


if __name__ == "__main__":
    main()
