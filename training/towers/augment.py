"""Augmentations that take the artist out of a drawing: colour, shading, placement.

All work on a batch of float32 images in [0, 1] and draw from one generator, so that a seed repeats a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    def scaled(self, strength: float) -> AugmentSettings:
        """Return these settings weakened to `strength` of themselves, 0 to 1."""
        low, high = self.scale
        weakened = {name: value * strength for name, value in vars(self).items() if name != "scale"}
        return AugmentSettings(scale=(low**strength, high**strength), **weakened)


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
        grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
        # Sampled as ink (1 - image), so that what lies outside is white paper.
        return 1.0 - F.grid_sample(
            1.0 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )

    def colour(self, images: Images, colour_matters: Mask) -> tuple[Images, Mask]:
        """Grey, recolour, invert or fade.

        Parameters
        ----------
        images : Images
            The batch.
        colour_matters : Mask
            Rows whose caption names a colour: these keep theirs.

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
        weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = torch.where(grey.view(-1, 1, 1, 1), (images * weights).sum(1, keepdim=True), images)
        images = torch.where(hue.view(-1, 1, 1, 1), self._permute_channels(images), images)
        images = torch.where(invert.view(-1, 1, 1, 1), 1.0 - images, images)
        contrast = self.uniform(n, 0.7, 1.2).view(-1, 1, 1, 1)
        brightness = self.uniform(n, -0.1, 0.1).view(-1, 1, 1, 1)
        images = ((images - 1.0) * contrast + 1.0 + brightness).clamp(0, 1)
        return images, grey | hue | invert

    def _permute_channels(self, images: Images) -> Images:
        """Swap colour channels by a random permutation each, and blend a little with the original."""
        order = torch.rand(len(images), 3, generator=self.generator).argsort(1)
        index = order.view(-1, 3, 1, 1).expand_as(images)
        blend = self.uniform(len(images), 0.6, 1.0).view(-1, 1, 1, 1)
        return images.gather(1, index) * blend + images * (1 - blend)

    def recolour_lines(self, images: Images, rows: Mask) -> Images:
        """Give black-on-white line art a random ink and paper."""
        n = len(images)
        ink = torch.rand(n, 3, 1, 1, generator=self.generator) * 0.6
        paper = 1.0 - torch.rand(n, 3, 1, 1, generator=self.generator) * 0.35
        swap = self.chance(n, 0.25).view(-1, 1, 1, 1)
        ink, paper = torch.where(swap, paper, ink), torch.where(swap, ink, paper)
        recoloured = ink + (paper - ink) * images
        return torch.where((rows & self.chance(n, 0.5)).view(-1, 1, 1, 1), recoloured, images)

    def corrupt(self, images: Images) -> Images:
        """Erase a box in some images and add noise to some."""
        s, n = self.settings, len(images)
        height, width = images.shape[-2:]
        top, left = self.uniform(n, 0, 0.8) * height, self.uniform(n, 0, 0.8) * width
        side = self.uniform(n, 0.15, 0.35) * height
        y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
        box = (
            (y >= top.view(-1, 1, 1))
            & (y < (top + side).view(-1, 1, 1))
            & (x >= left.view(-1, 1, 1))
            & (x < (left + side).view(-1, 1, 1))
            & self.chance(n, s.erase).view(-1, 1, 1)
        )
        images = torch.where(box.unsqueeze(1), images.new_tensor(1.0), images)
        amount = torch.where(self.chance(n, s.noise), self.uniform(n, 0, 0.08), torch.zeros(n))
        return images + amount.view(-1, 1, 1, 1) * torch.randn(images.shape, generator=self.generator)
