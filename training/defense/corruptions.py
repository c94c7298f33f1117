"""Harmless changes of a picture, which a detector must not take for an attack, and the typographic attack."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.defense.victim import to_images, to_pixels


def each(
    images: Float[Tensor, "B 3 H W"], change: Callable[[Image.Image], Image.Image]
) -> Float[Tensor, "B 3 H W"]:
    """Apply a change of PIL pictures to each image."""
    pictures = [change(Image.fromarray(pixels)).convert("RGB") for pixels in to_pixels(images)]
    return to_images(np.stack([np.asarray(picture) for picture in pictures]))


def jpeg(images: Float[Tensor, "B 3 H W"], quality: int) -> Float[Tensor, "B 3 H W"]:
    """Store as JPEG and read again."""

    def change(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return each(images, change)


def rescaled(images: Float[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 H W"]:
    """Scale to another size and back, as a picture from the web has been."""
    size = (int(images.shape[-1]), int(images.shape[-2]))
    bicubic = Image.Resampling.BICUBIC
    return each(images, lambda picture: picture.resize((side, side), bicubic).resize(size, bicubic))


def sensor_noise(
    images: Float[Tensor, "B 3 H W"], level: float, generator: torch.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Add Gaussian noise of `level` pixel levels, as a camera does."""
    noisy = images + level / 255 * torch.randn(images.shape, generator=generator)
    return to_images(to_pixels(noisy))


def typographic(images: Float[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float[Tensor, "B 3 H W"]:
    """Write a text across the lower third of each picture, black on white, as large as fits.

    Source: Goh et al., "Multimodal neurons in artificial neural networks" (2021).
    """
    height, width = images.shape[-2:]
    pictures = []
    for pixels, text in zip(to_pixels(images), texts, strict=True):
        picture = Image.fromarray(pixels)
        draw = ImageDraw.Draw(picture)
        size = height // 3
        while size > 6 and draw.textlength(text, ImageFont.load_default(size)) > width - 2:
            size -= 1
        draw.rectangle((0, height - height // 3, width, height), fill="white")
        draw.text((1, height - height // 3), text, fill="black", font=ImageFont.load_default(size))
        pictures.append(np.asarray(picture))
    return to_images(np.stack(pictures))


def shifted(images: Float[Tensor, "B 3 H W"], pixels: int = 1) -> Float[Tensor, "B 3 H W"]:
    """Move to the right and down, edges repeated."""
    padded = F.pad(images, (pixels, 0, pixels, 0), mode="replicate")
    return padded[..., : images.shape[-2], : images.shape[-1]]


# Name, and the change; each is drawn anew from its own seed.
HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda images: images,
    "jpeg 90": lambda images: jpeg(images, 90),
    "jpeg 75": lambda images: jpeg(images, 75),
    "rescaled": lambda images: rescaled(images, 48),
    "shifted": lambda images: shifted(images),
    "sensor noise": lambda images: sensor_noise(images, 2.0, torch.Generator().manual_seed(3)),
}
