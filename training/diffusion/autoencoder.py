"""Train the embedded pipeline's autoencoder: 128 px drawings to a 16x16 latent of 8 channels.

``python -m training.diffusion.autoencoder`` trains, on a GPU where there is one, and ``--resume`` goes on from the last
checkpoint. Encoder and decoder of a stock diffusers `AutoencoderKL` learn together, from L1 of pixels, L1 of
differences at three scales, which keeps edges sharp without a discriminator, and a small KL term.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from training.compute import CPU, mixed, pick_device, pick_precision
from training.corpus.build import DEFAULT_DIR
from training.diffusion.drawings import Drawings, sheet, to_pixels, to_tensor
from training.diffusion.loop import train_to_the_end
from training.towers.muon import Muon

DEFAULT_OUT = Path("work/autoencoder")
# Muon is for what lies between pixels and latents; these ends get AdamW.
_ENDS = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")


@dataclass(frozen=True)
class AutoencoderSettings:
    """Hyperparameters of a run.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps, and drawings a step.
    lr : float
        Peak learning rate; rises over 50 steps, falls as a cosine.
    channels : tuple[int, ...]
        Widths at 128, 64, 32 and 16 pixels a side, multiples of 8.
    latent : int
        Channels of the latent.
    edges : float
        Weight of the L1 distance between differences of neighbouring pixels, at three scales.
    kl : float
        Weight of the KL term.
    average : float
        Decay of the weights' moving average, a step.
    """

    steps: int = 2700
    batch: int = 8
    lr: float = 2e-3
    channels: tuple[int, ...] = (16, 32, 64, 128)
    latent: int = 8
    edges: float = 0.7
    kl: float = 0.005
    average: float = 0.998
    seed: int = 0


def build_autoencoder(channels: tuple[int, ...], latent: int, side: int) -> AutoencoderKL:
    """Return a randomly initialised `AutoencoderKL` that halves the side between each two of its widths."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        sample_size=side,
        scaling_factor=1.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def reconstruction_loss(found: Tensor, wanted: Tensor, edges: float) -> Tensor:
    """Return mean |found - wanted| plus `edges` times the same of differences of neighbours at three scales.

    Parameters
    ----------
    found, wanted : Tensor
        float32 [n, 3, H, W].
    edges : float
        Weight of the differences, which are added up over the scales 1, 1/2 and 1/4.
    """
    error = found - wanted
    loss = error.abs().mean()
    for scale in range(3):
        error = F.avg_pool2d(error, 2) if scale else error
        loss = loss + edges * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    return loss


class AutoencoderTrainer:
    """Holds the model, the optimisers and the data of one run.

    Parameters
    ----------
    drawings : Drawings
        Pictures; only the training split is learnt from.
    settings : AutoencoderSettings
        Hyperparameters.
    folder : Path
        Where checkpoints, sheets and the result go.
    device : torch.device
        Where it runs.
    precision : torch.dtype
        Of products and convolutions; weights stay in float32.
    """

    def __init__(
        self,
        drawings: Drawings,
        settings: AutoencoderSettings,
        folder: Path,
        device: torch.device = CPU,
        precision: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.drawings, self.settings, self.folder = drawings, settings, folder
        self.device, self.precision = device, precision
        self.train, self.held_out = drawings.split("train"), drawings.split("validation")
        model = build_autoencoder(settings.channels, settings.latent, drawings.pixels.shape[1])
        self.model = model.to(device, memory_format=torch.channels_last)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        inner = [p for n, p in self.model.named_parameters() if p.ndim > 1 and not n.startswith(_ENDS)]
        known = {id(p) for p in inner}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        self.optimisers = [
            Muon(inner, settings.lr),
            torch.optim.AdamW(rest, settings.lr, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step."""
        progress = self.step / self.settings.steps
        return min(1.0, (self.step + 1) / 50) * (0.04 + 0.48 * (1 + math.cos(math.pi * progress)))

    def loss(self, images: Float[Tensor, "batch 3 side side"]) -> Tensor:
        """Return the loss of images in [-1, 1]; the latents are drawn from the posterior."""
        s = self.settings
        with mixed(self.device, self.precision):
            moments = self.model.encoder(images).float()
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-12, 4)
        noise = torch.randn(mean.shape, generator=self.generator).to(self.device)
        with mixed(self.device, self.precision):
            found = self.model.decoder(mean + (0.5 * logvar).exp() * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(found, images, s.edges) + s.kl * kl

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        s = self.settings
        picked = torch.randint(len(self.train), (s.batch,), generator=self.generator).numpy()
        images = to_tensor(self.drawings.pixels[np.sort(self.train[picked])]).to(self.device)
        loss = self.loss(images.contiguous(memory_format=torch.channels_last))
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = s.lr * self.rate()
            optimiser.step()
        self.step += 1
        # The average forgets its random start.
        decay = min(s.average, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    def averaged(self) -> AutoencoderKL:
        """Return a model with the averaged weights, ready to encode and decode."""
        s = self.settings
        model = build_autoencoder(s.channels, s.latent, self.drawings.pixels.shape[1])
        model.load_state_dict(self.average)
        return model.to(self.device).eval()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return errors on held-out drawings, in units of the pixel range 0 to 1, and write a sheet."""
        model = self.averaged()
        chosen = self.held_out[:: max(1, len(self.held_out) // 64)]
        images, found = to_tensor(self.drawings.pixels[chosen]), []
        for part in images.split(16):
            found.append(model.decode(model.encode(part.to(self.device)).latent_dist.mode()).sample.cpu())
        made = torch.cat(found).clamp(-1, 1)
        rows = [r for i in range(0, 48, 12) for r in (images[i : i + 12], made[i : i + 12])]
        sheet(
            [to_pixels(row) for row in rows if len(row) == len(rows[0])], self.folder / "reconstructions.png"
        )
        error = (made - images) / 2
        return {
            "mae": float(error.abs().mean()),
            "psnr": float(-10 * error.square().mean((1, 2, 3)).log10().mean()),
        }

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]

    @torch.inference_mode()
    def export(self) -> None:
        """Write the averaged model as a diffusers folder, with the factor that gives latents unit variance."""
        model = self.averaged()
        images = self.drawings.pixels[self.train[:: max(1, len(self.train) // 512)]]
        parts = [to_tensor(images[i : i + 32]).to(self.device) for i in range(0, len(images), 32)]
        latents = torch.cat([model.encode(part).latent_dist.mode() for part in parts])
        model.register_to_config(scaling_factor=float(1 / latents.std()))
        model.cpu().save_pretrained(self.folder / "vae")
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    def run(self, validate_every: int) -> None:
        """Train to the end, with progress, checkpoints and validation."""
        train_to_the_end(self, validate_every)
        self.export()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "f32"), default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--validate-every", type=int, default=500)
    defaults = asdict(AutoencoderSettings())
    options = [name for name in defaults if name != "channels"]
    for name in options:
        parser.add_argument(f"--{name}", type=type(defaults[name]), default=defaults[name])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    settings = AutoencoderSettings(**{name: getattr(arguments, name) for name in options})
    trainer = AutoencoderTrainer(
        Drawings.load(arguments.corpus),
        settings,
        arguments.out,
        device,
        pick_precision(device, arguments.precision),
    )
    if arguments.resume:
        trainer.resume()
    trainer.run(arguments.validate_every)


if __name__ == "__main__":
    main()
