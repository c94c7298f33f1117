"""Augmentations that take the artist out of a drawing: colour, shading, placement.

All work on a batch of float32 images in [0, 1], on any device, and draw from one generator on the CPU, so that a seed
repeats a run. Most changes are for some drawings of a batch: only those are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
Mask = Bool[Tensor, "batch"]


@dataclass(frozen=True)
class AugmentSettings:
    """Strengths of the augmentations.

    Parameters
    ----------
    rotate : float
        Largest rotation, degrees.
    scale : tuple[float, float]
        Range of the zoom factor, log-uniform.
    stretch : float
        Largest change of the aspect ratio, natural logarithm.
    translate : float
        Largest shift, share of the side.
    grey, hue, invert, erase, noise : float
        Probabilities of each.
    restyle : float
        Share of the emoji that are redrawn with another pen, half of them without their fills.
    toned_light : float
        How much of the change of light a drawing keeps whose caption tells a skin tone.
    """

    rotate: float = 12.0
    scale: tuple[float, float] = (0.8, 1.15)
    stretch: float = 0.1
    translate: float = 0.06
    grey: float = 0.2
    hue: float = 0.15
    invert: float = 0.03
    erase: float = 0.1
    noise: float = 0.15
    restyle: float = 0.5
    toned_light: float = 1.0

    def scaled(self, strength: float) -> AugmentSettings:
        """Return these settings weakened to `strength` of themselves, 0 to 1; toned drawings keep their share."""
        low, high = self.scale
        kept = ("scale", "toned_light")
        weakened = {name: value * strength for name, value in vars(self).items() if name not in kept}
        return replace(self, scale=(low**strength, high**strength), **weakened)


class Augment:
    """Random geometry and colour for a batch.

    Parameters
    ----------
    settings : AugmentSettings
        Strengths.
    generator : torch.Generator
        Source of all randomness.
    """

    def __init__(self, settings: AugmentSettings, generator: torch.Generator) -> None:
        self.settings = settings
        self.generator = generator

    def uniform(self, count: int, low: float = 0.0, high: float = 1.0) -> Float[Tensor, " count"]:
        """Draw `count` numbers from [low, high)."""
        return torch.rand(count, generator=self.generator) * (high - low) + low

    def chance(self, count: int, probability: float) -> Mask:
        """Draw `count` coins that are true with `probability`."""
        return self.uniform(count) < probability

    def geometry(self, images: Images, size: int, may_flip: Mask) -> Images:
        """Rotate, zoom, stretch, shift and flip on a white ground, resampled to `size` pixels a side."""
        s, n = self.settings, len(images)
        angle = self.uniform(n, -s.rotate, s.rotate) * math.pi / 180
        zoom = torch.exp(self.uniform(n, math.log(s.scale[0]), math.log(s.scale[1])))
        stretch = torch.exp(self.uniform(n, -s.stretch, s.stretch))
        flip = torch.where(may_flip & self.chance(n, 0.5), -1.0, 1.0)
        cos, sin = torch.cos(angle), torch.sin(angle)
        # The grid maps output to input, hence the inverse of the zoom.
        theta = torch.stack(
            [
                torch.stack(
                    [flip * cos / (zoom * stretch), -sin / zoom, self.uniform(n, -2, 2) * s.translate], 1
                ),
                torch.stack(
                    [flip * sin / zoom, cos * stretch / zoom, self.uniform(n, -2, 2) * s.translate], 1
                ),
            ],
            1,
        )
        grid = F.affine_grid(theta.to(images.device), [n, 3, size, size], align_corners=False)
        # Sampled as ink (1 - image), so that what lies outside is white paper.
        return 1.0 - F.grid_sample(
            1.0 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )

    def colour(self, images: Images, colour_matters: Mask, toned: Mask | None = None) -> tuple[Images, Mask]:
        """Grey, recolour, invert or fade.

        Parameters
        ----------
        images : Images
            The batch.
        colour_matters : Mask
            Rows whose caption names a colour: these keep theirs.
        toned : Mask or None
            Rows whose caption tells a skin tone: unless they lose it here, their light changes by
            `AugmentSettings.toned_light` as much.

        Returns
        -------
        tuple[Images, Mask]
            The batch, and the rows that lost their colour: a caption must not claim a skin tone for them.
        """
        s, n = self.settings, len(images)
        free = ~colour_matters
        grey = free & self.chance(n, s.grey)
        hue = free & ~grey & self.chance(n, s.hue)
        invert = free & self.chance(n, s.invert)
        lost = grey | hue | invert
        order = torch.rand(n, 3, generator=self.generator).argsort(1)
        blend = self.uniform(n, 0.6, 1.0)
        contrast = self.uniform(n, 0.7, 1.2)
        brightness = self.uniform(n, -0.1, 0.1)
        if toned is not None:
            share = torch.where(toned & ~lost, s.toned_light, 1.0)
            contrast, brightness = 1.0 + (contrast - 1.0) * share, brightness * share
        images = images.clone()
        weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        _change(images, grey, lambda x, _: (x * weights).sum(1, keepdim=True))
        _change(images, hue, lambda x, at: _permute_channels(x, order[at], blend[at]))
        _change(images, invert, lambda x, _: 1.0 - x)
        images.sub_(1.0).mul_(_each(contrast, images)).add_(1.0).add_(_each(brightness, images))
        return images.clamp_(0, 1), lost

    def recolour_lines(self, images: Images, rows: Mask) -> Images:
        """Give half of the black-on-white line art among `rows` a random ink and paper."""
        n = len(images)
        ink = torch.rand(n, 3, 1, 1, generator=self.generator) * 0.6
        paper = 1.0 - torch.rand(n, 3, 1, 1, generator=self.generator) * 0.35
        swap = self.chance(n, 0.25).view(-1, 1, 1, 1)
        ink, paper = torch.where(swap, paper, ink), torch.where(swap, ink, paper)
        images = images.clone()

        def recoloured(x: Images, at: Tensor) -> Images:
            dark, light = ink[at].to(x.device), paper[at].to(x.device)
            return dark + (light - dark) * x

        _change(images, rows & self.chance(n, 0.5), recoloured)
        return images

    def corrupt(self, images: Images) -> Images:
        """Erase a box in some images and add noise to some."""
        s, n = self.settings, len(images)
        height, width = images.shape[-2:]
        images = images.clone()
        top = (self.uniform(n, 0, 0.8) * height).long().tolist()
        left = (self.uniform(n, 0, 0.8) * width).long().tolist()
        side = (self.uniform(n, 0.15, 0.35) * height).long().tolist()
        for i in self.chance(n, s.erase).nonzero().flatten().tolist():
            images[i, :, top[i] : top[i] + side[i], left[i] : left[i] + side[i]] = 1.0
        noisy = self.chance(n, s.noise)
        amount = self.uniform(n, 0, 0.08)

        def noised(x: Images, at: Tensor) -> Images:
            noise = torch.randn(x.shape, generator=self.generator)
            return x + (amount[at].view(-1, 1, 1, 1) * noise).to(x.device)

        _change(images, noisy, noised)
        return images


def _each(values: Float[Tensor, " batch"], images: Images) -> Float[Tensor, "batch 1 1 1"]:
    return values.view(-1, 1, 1, 1).to(images.device)


def _change(images: Images, rows: Mask, change: Callable[[Images, Tensor], Images]) -> None:
    """Replace `rows` of the batch, in place, by what `change` makes of them; it is also told which they are."""
    at = rows.nonzero().flatten()
    if len(at):
        here = at.to(images.device)
        images[here] = change(images[here], at).expand(len(at), *images.shape[1:])


def _permute_channels(images: Images, order: Tensor, blend: Tensor) -> Images:
    """Swap the colour channels of each image by its own permutation, and blend a little with the original."""
    index = order.view(-1, 3, 1, 1).expand_as(images).to(images.device)
    share = _each(blend, images)
    return images.gather(1, index) * share + images * (1 - share)
