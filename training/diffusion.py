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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from training.autoencoder import DEFAULT_OUT as AUTOENCODER
from training.autoencoder import sheet
from training.corpus.build import DEFAULT_DIR
from training.diffusion_data import Conditions, DiffusionData
from training.diffusion_model import (
    SCHEDULE,
    DiffusionSettings,
    EmbeddingNoiser,
    build_optimisers,
    build_unet,
    serving_solver,
)
from training.embeddings import DEFAULT_CLIP
from training.embeddings import DEFAULT_OUT as EMBEDDINGS
from training.pairs import Corpus

DEFAULT_OUT = Path("work/diffusion")
SHEET_PROMPTS = (
    "red apple", "dog face", "woman firefighter", "sun", "red heart", "grinning face", "man astronaut dark skin tone",
    "automobile", "flag germany", "cat face", "pizza", "tulip", "thumbs up", "crown", "fish", "soccer ball",
)  # fmt: skip


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
        self.optimisers = build_optimisers(self.unet, settings)
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
        self.unet.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = s.lr * self.rate()
            optimiser.step()
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
            "text_fingerprint": self.data.conditions.text_fingerprint,
            "equaliser": self.equaliser,
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint, also where the image tower was tuned since: its space is the text's.

        Raises
        ------
        ValueError
            Where it was trained on another text tower.
        """
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        if state["text_fingerprint"] != self.data.conditions.text_fingerprint:
            raise ValueError("the checkpoint was trained on another text tower; train anew")
        # The weights behind it know this one.
        self.equaliser = state["equaliser"]
        self.unet.load_state_dict(state["unet"])
        self.average = state["average"]
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
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
