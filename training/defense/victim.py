"""The image tower as an attacker sees it: differentiable down to the pixels, with every weight known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from services.bundle.load import Bundle
from services.encoding.clip import build_clip

# From images in [0, 1], shape (B, 3, H, W), to unit embeddings, shape (B, d), keeping gradients.
Embed: TypeAlias = Callable[[Tensor], Tensor]


class Victim(nn.Module):
    """A bundle's image tower with its normalisation, from pixels to unit embeddings.

    Parameters
    ----------
    bundle : Bundle
        Verified.

    Notes
    -----
    Images are given at the tower's own size, so that a budget of epsilon holds for what the tower sees. A picture of
    another size is resized first, and the attack is on the resized one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        config = bundle.clip_config
        model = build_clip(config, bundle.clip_weights)
        self.visual: nn.Module = model.visual.eval().requires_grad_(False)
        self.image_size = config.image_size
        self.logit_scale = float(model.logit_scale.exp())
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))

    def raw(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d"]:
        """Return embeddings before normalisation of images in [0, 1]."""
        result: Tensor = self.visual((images - self.mean) / self.std)
        return result

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d"]:
        """Return unit embeddings of images in [0, 1]."""
        return nn.functional.normalize(self.raw(images), dim=-1)

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "B 3 H W"], batch: int = 32) -> Float[Tensor, "B d"]:
        """Return unit embeddings without gradients, a piece at a time."""
        return torch.cat([self(chunk) for chunk in images.split(batch)])


def to_images(pixels: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Return 8-bit pictures as images in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))).float().div_(255)


def to_pixels(images: Float[Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B H W 3"]:
    """Return images in [0, 1] as 8-bit pictures: what an attacker can really send."""
    rounded: np.ndarray = images.mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
    return np.ascontiguousarray(np.moveaxis(rounded, -3, -1))
