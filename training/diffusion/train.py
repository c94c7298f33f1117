"""Train the embedded text-to-image model: latent diffusion, steered by the bundle's own towers.

``python -m training.diffusion.train`` trains, on a GPU where there is one, and ``--resume`` goes on from the last
checkpoint (``--steps`` may change: the learning rate follows the share that is done). ``python -m
training.diffusion.export`` then makes the pipeline.

The model is Stable unCLIP (Ramesh et al., 2022; Rombach et al., 2022), small: a UNet on 16x16 latents sees the
caption's token states by cross-attention and a joint embedding by its class embedding, which scales and shifts every
block. Half of the samples have the embedding alone, so that it decides the picture and a change of it is seen; the
others have both, the prompt alone, or neither, for guidance (Ho and Salimans, 2022). v-prediction (Salimans and Ho,
2022) on the cosine schedule; the exported weights are a moving average.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from training.compute import CPU, mixed, pick_device, pick_precision
from training.corpus.build import DEFAULT_DIR
from training.diffusion.autoencoder import DEFAULT_OUT as AUTOENCODER
from training.diffusion.data import Conditions, DiffusionData
from training.diffusion.drawings import Drawings, sheet, to_pixels
from training.diffusion.loop import train_to_the_end
from training.diffusion.model import (
    SCHEDULE,
    DiffusionSettings,
    EmbeddingNoiser,
    build_optimisers,
    build_unet,
    serving_solver,
)
from training.towers.embed import DEFAULT_CLIP
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS

DEFAULT_OUT = Path("work/diffusion")
SHEET_PROMPTS = (
    "red apple", "dog face", "woman firefighter", "sun", "red heart", "grinning face", "man astronaut dark skin tone",
    "automobile", "flag germany", "cat face", "pizza", "tulip", "thumbs up", "crown", "fish", "soccer ball",
)  # fmt: skip


class DiffusionTrainer:
    """Holds the model, the optimisers and the data of one run.

    Parameters
    ----------
    data : DiffusionData
        Latents and conditions.
    settings : DiffusionSettings
        Hyperparameters.
    folder : Path
        Where checkpoints, sheets and the log go.
    device : torch.device
        Where it runs; the data moves there.
    precision : torch.dtype
        Of products and convolutions; weights stay in float32.
    """

    def __init__(
        self,
        data: DiffusionData,
        settings: DiffusionSettings,
        folder: Path,
        device: torch.device = CPU,
        precision: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.folder = settings, folder
        self.device, self.precision = device, precision
        self.latents, self.held_out_latents = data.latents.to(device), data.held_out_latents.to(device)
        self.weights = data.weights.to(device)
        self.conditions, self.held_out = data.conditions.to(device), data.held_out.to(device)
        self.latent_shape = tuple(data.latents.shape[1:])
        self.unet = build_unet(
            settings.channels,
            *self.latent_shape[:2],
            data.conditions.states.shape[-1],
            data.conditions.images.shape[1],
        ).to(device, memory_format=torch.channels_last)
        self.average = {k: v.clone() for k, v in self.unet.state_dict().items()}
        self.equaliser = data.conditions.equaliser().to(device)
        self.noiser = EmbeddingNoiser(torch.cat([data.conditions.images, data.conditions.texts[0]]), device)
        self.schedule = DDPMScheduler(**SCHEDULE)
        self.optimisers = build_optimisers(self.unet, settings)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        caption = self.conditions.caption
        # The drawings sorted by caption: those of one caption are a range, which begins at `first`.
        self.sorted = caption.argsort(stable=True)
        self.count = torch.bincount(caption, minlength=len(self.conditions.captions))
        self.first = self.count.cumsum(0) - self.count
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
        kind, source, template, sibling, noisy, pick, mixed, way = torch.rand(
            8, n, generator=generator, device=self.device
        )
        # As often the bare caption as all templates together: prompts are mostly bare.
        chosen = ((template * 2 - 1).clamp(min=0) * len(conditions.texts)).long()
        images = conditions.images[index]
        # Siblings are drawings that are trained on, also of a held-out drawing.
        other = self.sorted[
            (self.first[caption] + (pick * self.count[caption]).long()).clamp(max=len(self.sorted) - 1)
        ]
        swapped = (sibling < s.sibling_share) & (self.count[caption] > 0)
        images = torch.where(swapped.unsqueeze(1), self.conditions.images[other], images)
        embeddings = torch.where(
            (source < s.image_share).unsqueeze(1), images, conditions.texts[chosen, caption]
        )
        way = way * (mixed < s.mixed_share)
        embeddings = torch.lerp(embeddings, embeddings.roll(1, 0), way.unsqueeze(1))
        levels = torch.randint(0, s.noisy_level, (n,), generator=generator, device=self.device)
        labels = self.class_vector(embeddings, levels * (noisy < s.noisy_share), generator)
        # In order: the embedding alone, both, the prompt alone, neither.
        no_embedding = kind >= 1 - s.prompt_alone - s.nothing
        no_prompt = (kind < s.embedding_alone) | (kind >= 1 - s.nothing)
        labels = torch.where(no_embedding.unsqueeze(1), 0.0, labels)
        states = torch.where(no_prompt.view(-1, 1, 1), conditions.empty, conditions.states[caption])
        return states.float(), labels

    def loss(self, latents: Tensor, states: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of v at times drawn evenly over the schedule."""
        noisy, times, velocity = self.noised(latents, generator)
        return F.mse_loss(self.predict(noisy, times, states, labels), velocity)

    def noised(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents at times drawn evenly over the schedule, those times, and v."""
        n, latents = len(latents), latents.float()
        # Stratified: the loss depends on the time more than on anything else.
        offsets = torch.rand(n, generator=generator, device=self.device)
        times = ((torch.arange(n, device=self.device) + offsets) / n * 1000).long()
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        noisy = self.schedule.add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
        return noisy, times, self.schedule.get_velocity(latents, noise, times)

    def predict(self, noisy: Tensor, times: Tensor, states: Tensor, labels: Tensor) -> Tensor:
        """Return the UNet's v, float32."""
        with mixed(self.device, self.precision):
            return self.unet(noisy, times, states, class_labels=labels).sample.float()

    def batch_loss(self, index: Tensor) -> Tensor:
        """Return the loss of the drawings of `index`."""
        states, labels = self.conditioning(self.conditions, index, self.generator)
        return self.loss(self.latents[index], states, labels, self.generator)

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        s = self.settings
        self.unet.train()
        loss = self.batch_loss(torch.multinomial(self.weights, s.batch, generator=self.generator))
        self.unet.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = s.lr * self.rate()
            optimiser.step()
        self.step += 1
        # The average forgets its random start.
        decay = min(s.average, 1 - 8 / (self.step + 16))
        torch._foreach_lerp_(list(self.average.values()), list(self.unet.state_dict().values()), 1 - decay)
        return float(loss.detach())

    def averaged(self) -> UNet2DConditionModel:
        """Return a UNet with the averaged weights, which takes equalised embeddings."""
        model = UNet2DConditionModel.from_config(self.unet.config)
        model.load_state_dict(self.average)
        model = model.to(self.device, memory_format=torch.channels_last)
        return model.eval().requires_grad_(False)

    def exported(self) -> UNet2DConditionModel:
        """Return a UNet with the averaged weights, which takes raw embeddings as pipelines give them."""
        model = self.averaged().cpu()
        first, equaliser = model.class_embedding.linear_1, self.equaliser.cpu().double()
        d = len(equaliser)
        first.weight[:, :d] = (first.weight[:, :d].double() @ equaliser.T).float()
        return model

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return the averaged model's loss on held-out and on training drawings, always with the same draws."""
        generator = torch.Generator(self.device).manual_seed(1)
        trained, self.unet = self.unet, self.averaged()
        result = {}
        for name, latents, conditions in (
            ("loss", self.held_out_latents, self.held_out),
            ("loss_seen", self.latents, self.conditions),
        ):
            total = 0.0
            index = torch.arange(0, len(latents), max(1, len(latents) // 256), device=self.device)
            for part in index.split(64):
                states, labels = self.conditioning(conditions, part, generator)
                total += float(self.loss(latents[part], states, labels, generator)) * len(part)
            result[name] = total / len(index)
        self.unet = trained
        return result

    @torch.inference_mode()
    def sample(
        self, captions: list[str], steps: int = 16, guidance: float = 3.0, seed: int = 0
    ) -> Float[Tensor, "n latent h w"]:
        """Return latents for captions of the corpus, from their text embeddings and token states."""
        conditions, generator = self.conditions, torch.Generator().manual_seed(seed)
        where = torch.from_numpy(np.searchsorted(conditions.captions, captions)).to(self.device)
        zeros = torch.zeros_like(where)
        quiet = torch.Generator(self.device).manual_seed(seed)
        labels = self.class_vector(conditions.texts[0, where], zeros, quiet)
        labels = torch.cat([torch.zeros_like(labels), labels])
        states = torch.cat([conditions.empty.expand(len(where), -1, -1), conditions.states[where]]).float()
        solver, model = serving_solver(), self.averaged()
        solver.set_timesteps(steps)
        latents = torch.randn((len(where), *self.latent_shape), generator=generator).to(self.device)
        for time_step in solver.timesteps:
            with mixed(self.device, self.precision):
                both = model(torch.cat([latents] * 2), time_step, states, class_labels=labels).sample
            without, conditioned = both.float().chunk(2)
            latents = solver.step(
                without + guidance * (conditioned - without), time_step, latents
            ).prev_sample
        return latents.cpu()

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "fingerprint": self.conditions.fingerprint,
            "text_fingerprint": self.conditions.text_fingerprint,
            "equaliser": self.equaliser,
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self, train: bool = True) -> None:
        """Go on from the last checkpoint, also where the image tower was tuned since: its space is the text's.

        Parameters
        ----------
        train : bool
            Whether training goes on; else the optimisers may be of other parameters.

        Raises
        ------
        ValueError
            Where it was trained on another text tower.
        """
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.device)
        if state["text_fingerprint"] != self.conditions.text_fingerprint:
            raise ValueError("the checkpoint was trained on another text tower; train anew")
        # The weights behind it know this one.
        self.equaliser = state["equaliser"]
        self.unet.load_state_dict(state["unet"])
        self.average = state["average"]
        if train:
            for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]

    def write_sheet(self, decode) -> None:
        """Write pictures of `SHEET_PROMPTS`, two seeds each."""
        known = set(self.conditions.captions)
        prompts = [p for p in SHEET_PROMPTS if p in known][:16]
        rows = [to_pixels(decode(self.sample(prompts, seed=seed))) for seed in (0, 1)]
        half = max(1, len(prompts) // 2)
        parts = [row[i : i + half] for i in range(0, 2 * half, half) for row in rows]
        sheet(parts, self.folder / "samples.png")

    def run(self, validate_every: int, decode) -> None:
        """Train to the end, with progress, checkpoints, validation and sheets.

        Parameters
        ----------
        validate_every : int
            Steps between validations, sheets and checkpoints.
        decode : callable
            From latents to images in [-1, 1].
        """
        train_to_the_end(self, validate_every, lambda: self.write_sheet(decode))


def load_trainer(arguments: argparse.Namespace, settings: DiffusionSettings) -> DiffusionTrainer:
    """Return a trainer on the paths of the command line."""
    data = DiffusionData.build(
        Drawings.load(arguments.corpus),
        arguments.clip,
        arguments.embeddings,
        arguments.autoencoder / "vae",
        arguments.out / "latents.npz",
    )
    device = pick_device(arguments.device)
    return DiffusionTrainer(
        data, settings, arguments.out, device, pick_precision(device, arguments.precision)
    )


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where everything is."""
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--clip", type=Path, default=DEFAULT_CLIP, help="folder of the towers")
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS, help="by the same towers")
    parser.add_argument("--autoencoder", type=Path, default=AUTOENCODER)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "f32"), default="auto")


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
