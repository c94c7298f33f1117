"""From latents to pixels: the autoencoder for pictures, a linear map for previews."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from services.errors import GenerationFailed
from services.imaging.pipeline import Parts

# Latents that the linear map is fitted on: so many pictures of so many latents a side.
FIT_PICTURES = 8
FIT_SIDE = 8


class Decoder:
    """Decodes one picture at a time, so that no picture depends on its neighbours.

    Parameters
    ----------
    parts : Parts
        The pipeline.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._map: Float[Tensor, "channels_and_one 3"] | None = None

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "1 c h w"]) -> UInt8[NDArray[np.uint8], "height width 3"]:
        """Return the picture that finished latents stand for.

        Raises
        ------
        GenerationFailed
            Where its numbers are not finite.
        """
        pixels = self._pixels(latents)
        if not torch.isfinite(pixels).all():
            raise GenerationFailed("the numbers of this image are not finite")
        return _bytes(pixels[0])

    @torch.inference_mode()
    def preview(self, latents: Float[Tensor, "1 c h w"]) -> UInt8[NDArray[np.uint8], "height width 3"]:
        """Return a rough picture at a pixel a latent: a linear map, thousands of times cheaper than `decode`."""
        if self._map is None:
            self._map = self._fitted()
        points = latents[0].permute(1, 2, 0).float().cpu()
        ones = torch.ones((*points.shape[:2], 1))
        return _bytes((torch.cat([points, ones], dim=2) @ self._map).permute(2, 0, 1))

    def _pixels(self, latents: Tensor) -> Float[Tensor, "1 3 height width"]:
        vae, config = self._parts.vae, self._parts.vae.config
        scaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        decoded: Tensor = vae.decode(scaled.to(self._parts.device, self._parts.dtype), return_dict=False)[0]
        return decoded.float().cpu()

    def _fitted(self) -> Float[Tensor, "channels_and_one 3"]:
        """Fit pixels, averaged over what a latent stands for, to latents by least squares.

        On smooth random latents: neighbours in pictures are alike, and each pixel depends on several latents.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (FIT_PICTURES, self._parts.latent_channels, 2, 2)
        coarse = torch.randn(shape, generator=generator)
        latents = functional.interpolate(coarse, (FIT_SIDE, FIT_SIDE), mode="bilinear", align_corners=True)
        pixels = torch.cat([self._pixels(one[None]) for one in latents])
        averages = functional.adaptive_avg_pool2d(pixels, FIT_SIDE)
        x = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        fitted: Tensor = torch.linalg.lstsq(x, averages.permute(0, 2, 3, 1).reshape(-1, 3)).solution
        return fitted


def _bytes(pixels: Float[Tensor, "3 height width"]) -> NDArray[np.uint8]:
    """Return pixels in [-1, 1] as 8-bit RGB, shape (height, width, 3), rounded as diffusers does."""
    scaled = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    result: NDArray[np.uint8] = (scaled * 255).round().to(torch.uint8).contiguous().numpy()
    return result
