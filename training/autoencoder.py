"""Train the embedded pipeline's autoencoder: 64 px drawings to an 8x8 latent, a genuine diffusers `AutoencoderKL`.

``python -m training.autoencoder`` trains, ``--resume`` goes on from the last checkpoint.

Two cores leave half an hour for this, so only the decoder learns by gradient. The encoder's weights are set: it
computes the principal components of 8x8 patches, the best linear code of that size (Eckart and Young, 1936), by the
three strided convolutions that any `AutoencoderKL` of these widths has; its residual branches are zero. That halves the
cost of a step, and the latents are known, and can be cached and diffused, before the decoder is done. The decoder sees
its neighbours' codes and learns the edges that a linear code loses.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from training.corpus.build import DEFAULT_DIR
from training.pairs import Corpus

DEFAULT_OUT = Path("work/autoencoder")
PATCH = 8
# Large against the latents, so that the last group norm's deviation hardly depends on them (see `write_encoder`).
ANCHOR = 30.0


@dataclass(frozen=True)
class AutoencoderSettings:
    """Hyperparameters of a run.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps, and drawings a step.
    lr : float
        Peak learning rate; rises over 100 steps, falls as a cosine.
    channels : tuple[int, ...]
        Widths at 64, 32, 16 and 8 pixels a side; no two in a row alike; the first 12 or
        more, the third `latent` or more, a quarter of the last more than half of `latent`.
    latent : int
        Channels of the latent.
    noise : float
        Deviation of the noise that the decoder is trained against, in units of the latent (whose mean variance is 1);
        also the posterior's deviation.
    edges : float
        Weight of the L1 distance between differences of neighbouring pixels.
    shift : int
        Largest shift of a drawing, pixels: it moves edges over the patch grid.
    """

    steps: int = 1200
    batch: int = 8
    lr: float = 2e-3
    channels: tuple[int, ...] = (12, 24, 48, 96)
    latent: int = 12
    noise: float = 0.08
    edges: float = 1.0
    shift: int = 3
    seed: int = 0


def build_autoencoder(channels: tuple[int, ...], latent: int) -> AutoencoderKL:
    """Return a randomly initialised `AutoencoderKL` that halves the side between each two of its widths."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=4,
        sample_size=PATCH * 8,
        scaling_factor=1.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def to_tensor(pixels: np.ndarray) -> Float[Tensor, "batch 3 height width"]:
    """Return uint8 [n, H, W, 3] as float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def principal_components(
    images: Float[Tensor, "batch 3 height width"], side: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the leading directions and their variances of patches.

    Parameters
    ----------
    images : Tensor
        float32 [n, 3, H, W].
    side, count : int
        Side of a patch, pixels, and how many directions to keep.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        Mean [3, side, side], directions [count, 3, side, side] of unit length, variances [count].
    """
    patches = F.unfold(images, side, stride=side).transpose(1, 2).reshape(-1, 3 * side * side).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    leading = vectors.T.flip(0)[:count].reshape(count, 3, side, side)
    return mean.view(3, side, side).float(), leading.float(), values.flip(0)[:count].float()


def latent_scale(variances: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """Return the factor of each component: half way (in logarithm) to whitening, mean variance 1.

    Whitened, the finest component would weigh as much in the diffusion's loss as the coarsest; untouched, the coarsest
    would weigh two hundred times the finest and drown it.
    """
    return variances.pow(-0.25) / variances.sqrt().mean().sqrt()


@torch.no_grad()
def write_encoder(
    model: AutoencoderKL, images: Float[Tensor, "batch 3 height width"], noise: float
) -> tuple[Tensor, Tensor]:
    """Set the encoder's weights so that the latent is the scaled principal components of 8x8 patches.

    Down-sampling by 2 with every value kept is a strided convolution (3 values become 12); 4x4 patches are then cut
    to their leading components, which is where the widths force a loss, and 8x8 patches to the latent. The way out is
    a group norm and SiLU, made harmless: silu(x) - silu(-x) = x, so each component enters as a pair; and each group
    also holds constants +-ANCHOR, so that its mean is 0 and its deviation almost constant.

    Parameters
    ----------
    model : AutoencoderKL
        Of `build_autoencoder`; changed in place.
    images : Tensor
        Drawings whose patches define the components, in [-1, 1].
    noise : float
        The posterior's deviation.

    Returns
    -------
    tuple[Tensor, Tensor]
        Weight [latent, 3, 8, 8] and bias [latent] of the one convolution of stride 8 that gives the same latents up to
        what the 4x4 patches lose: a thousandth.
    """
    encoder, latent = model.encoder, model.config.latent_channels
    for parameter in encoder.parameters():
        parameter.zero_()
    widths = model.config.block_out_channels
    keep = widths[1]
    _, quarter, _ = principal_components(images, PATCH // 2, keep)
    mean, eighth, variances = principal_components(images, PATCH, latent)
    eighth = eighth * latent_scale(variances).view(-1, 1, 1, 1)

    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    blocks = encoder.down_blocks
    for block in blocks[1:-1]:
        shortcut = block.resnets[0].conv_shortcut.weight
        shortcut[:, :, 0, 0] = torch.eye(*shortcut.shape[:2])
    halve, quarter_conv, eighth_conv = (block.downsamplers[0].conv for block in blocks[:-1])
    for colour in range(3):
        for y in range(2):
            for x in range(2):
                halve.weight[4 * colour + 2 * y + x, colour, y, x] = 1.0
    # [count, 3, Y, y, X, x] -> [count, (3, y, x), Y, X]: the finer position became a channel one level up.
    quarter_conv.weight[:keep, :12, :2, :2] = (
        quarter.reshape(keep, 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(keep, 12, 2, 2)
    )
    parts = eighth.reshape(latent, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5)
    eighth_conv.weight[:latent, :keep, :2, :2] = torch.einsum("lYXcyx,kcyx->lkYX", parts, quarter)
    bias = -(eighth * mean).sum((1, 2, 3))
    eighth_conv.bias[:latent] = bias

    last, groups = blocks[-1].resnets[0].conv_shortcut, model.config.norm_num_groups
    size = widths[-1] // groups
    pairs = -(-latent // groups)
    for group in range(groups):
        start = group * size
        for i in range(pairs):
            source = group * pairs + i
            if source < latent:
                last.weight[start + 2 * i, source, 0, 0] = 1.0
                last.weight[start + 2 * i + 1, source, 0, 0] = -1.0
                encoder.conv_out.weight[source, start + 2 * i, 1, 1] = 1.0
                encoder.conv_out.weight[source, start + 2 * i + 1, 1, 1] = -1.0
        signs = torch.tensor([1.0, -1.0]).repeat((size - 2 * pairs) // 2)
        last.bias[start + 2 * pairs : start + 2 * pairs + len(signs)] = ANCHOR * signs
        encoder.conv_norm_out.weight[start : start + size] = ANCHOR * (len(signs) / size) ** 0.5
    encoder.conv_out.bias[latent:] = 2 * math.log(noise)
    encoder.requires_grad_(False)
    return eighth, bias


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Shift each drawing by up to `shift` pixels on white, and mirror half of them."""
    n = len(images)
    offsets = torch.randint(0, 2 * shift + 1, (n, 2), generator=generator).tolist()
    mirror = torch.randint(0, 2, (n,), generator=generator).tolist()
    padded = F.pad(images, (shift,) * 4, value=1.0)
    side = images.shape[-1]
    crops = [
        padded[i, :, y : y + side, x : x + side].flip(-1)
        if mirror[i]
        else padded[i, :, y : y + side, x : x + side]
        for i, (y, x) in enumerate(offsets)
    ]
    return torch.stack(crops)


def reconstruction_loss(found: Tensor, wanted: Tensor, edges: float) -> Tensor:
    """Return mean |found - wanted| plus `edges` times the same of horizontal and vertical differences."""
    error = found - wanted
    rough = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges * rough


def sheet(rows: list[Tensor], path: Path, scale: int = 2) -> None:
    """Write rows of images in [-1, 1], each [n, 3, H, W], as one PNG."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


class AutoencoderTrainer:
    """Holds the model, the optimiser and the data of one run.

    Parameters
    ----------
    corpus : Corpus
        Pictures; only the training split of the training artists is learnt from.
    settings : AutoencoderSettings
        Hyperparameters.
    folder : Path
        Where checkpoints, sheets and the result go.
    """

    def __init__(self, corpus: Corpus, settings: AutoencoderSettings, folder: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.folder = settings, folder
        self.train_rows, self.held_out = corpus.rows("train"), corpus.rows("validation")
        self.pixels = corpus.plain[self.train_rows]
        self.held_out_pixels = corpus.plain[self.held_out]
        self.model = build_autoencoder(settings.channels, settings.latent)
        self.projection, self.bias = write_encoder(self.model, to_tensor(self.pixels[::6]), settings.noise)
        self.decoder: nn.Module = self.model.decoder
        self.average = {k: v.clone() for k, v in self.decoder.state_dict().items()}
        self.optimiser = torch.optim.Adam(self.decoder.parameters(), lr=settings.lr, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step."""
        progress = self.step / self.settings.steps
        return min(1.0, (self.step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        s = self.settings
        picked = torch.randint(len(self.pixels), (s.batch,), generator=self.generator).numpy()
        images = shifted(to_tensor(self.pixels[picked]), s.shift, self.generator)
        # Not through the encoder: the same numbers, at a fiftieth of the cost.
        latents = F.conv2d(images, self.projection, self.bias, stride=PATCH)
        latents = latents + s.noise * torch.randn(latents.shape, generator=self.generator)
        loss = reconstruction_loss(self.decoder(latents), images, s.edges)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = s.lr * self.rate()
        self.optimiser.step()
        self.step += 1
        # The average forgets its random start: a fixed decay would keep a tenth of it after 2,300 steps.
        decay = min(0.995, self.step / (self.step + 10))
        for name, value in self.decoder.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return errors on held-out drawings, in units of the pixel range 0 to 1, and write a sheet."""
        images = to_tensor(self.held_out_pixels[:: max(1, len(self.held_out_pixels) // 96)])
        trained = {k: v.clone() for k, v in self.decoder.state_dict().items()}
        self.decoder.load_state_dict(self.average)
        found = torch.cat([self.model.decode(self.encode(part)).sample for part in images.split(16)])
        self.decoder.load_state_dict(trained)
        rows = [r for i in range(0, 48, 12) for r in (images[i : i + 12], found[i : i + 12])]
        sheet(rows, self.folder / "reconstructions.png")
        error = (found.clamp(-1, 1) - images) / 2
        return {
            "mae": float(error.abs().mean()),
            "psnr": float(-10 * error.square().mean((1, 2, 3)).log10().mean()),
        }

    def encode(self, images: Tensor) -> Tensor:
        """Return latents without noise, float32 [n, latent, H / 8, W / 8]."""
        return self.model.encode(images).latent_dist.mode()

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def export(self) -> None:
        """Write the model, with the averaged decoder, as a diffusers folder."""
        trained = {k: v.clone() for k, v in self.decoder.state_dict().items()}
        self.decoder.load_state_dict(self.average)
        self.model.save_pretrained(self.folder / "vae")
        self.decoder.load_state_dict(trained)
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    def run(self, validate_every: int, save_every: int) -> None:
        """Train to the end, with progress, checkpoints and sheets."""
        # The encoder is done before the first step: whoever diffuses latents need not wait for the decoder.
        self.export()
        started, first = time.monotonic(), self.step
        recent: list[float] = []
        while self.step < self.settings.steps:
            recent.append(self.train_step())
            done = self.step == self.settings.steps
            if self.step % 25 == 0 or done:
                pace = (time.monotonic() - started) / (self.step - first)
                print(
                    f"step {self.step}/{self.settings.steps} loss {np.mean(recent[-50:]):.4f} "
                    f"{self.settings.batch / pace:.0f} drawings/s, "
                    f"{(self.settings.steps - self.step) * pace / 60:.0f} min left",
                    flush=True,
                )
            if self.step % validate_every == 0 or done:
                figures = {"step": self.step, "minutes": (time.monotonic() - started) / 60, **self.validate()}
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(figures) + "\n")
                print(figures, flush=True)
            if self.step % save_every == 0 or done:
                self.save()
                self.export()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=250)
    defaults = asdict(AutoencoderSettings())
    for name in ("steps", "batch", "lr", "noise", "edges", "seed"):
        parser.add_argument(f"--{name}", type=type(defaults[name]), default=defaults[name])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {name: getattr(arguments, name) for name in ("steps", "batch", "lr", "noise", "edges", "seed")}
    trainer = AutoencoderTrainer(Corpus.load(arguments.corpus), AutoencoderSettings(**chosen), arguments.out)
    if arguments.resume:
        trainer.resume()
    trainer.run(arguments.validate_every, arguments.save_every)


if __name__ == "__main__":
    main()
