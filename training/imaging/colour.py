"""Colours of pictures: CIE Lab, and which named colour the ink of a picture has."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Pixels = np.ndarray

# sRGB (D65) to XYZ, and the white it is relative to: IEC 61966-2-1.
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])
# sRGB of the colours as the artists use them.
NAMED = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (85, 172, 238),
    "purple": (170, 142, 214),
    "brown": (155, 93, 59),
    "black": (41, 47, 51),
    "white": (238, 238, 238),
    "grey": (153, 170, 181),
    "pink": (244, 171, 186),
}
# A pixel this near to the white ground in all channels is no ink.
GROUND = 250
# Shading changes lightness, not what a colour is called.
LIGHTNESS = 0.5


def lab(pixels: Pixels) -> Float[np.ndarray, "n h w 3"]:
    """Return CIE L*a*b* of sRGB pixels, float64; L* from 0 to 100."""
    value = pixels / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    t = linear @ XYZ.T / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1
    )


def colour_shares(pixels: Pixels) -> Float[NDArray[np.float64], "n colours"]:
    """Return of each picture, uint8 [n, H, W, 3], the share of its ink that is nearest to each colour of `NAMED`."""
    scale = np.array([LIGHTNESS, 1, 1])
    centres = lab(np.array(list(NAMED.values()), np.uint8)[None, None])[0, 0] * scale
    seen = lab(pixels) * scale
    nearest = np.square(seen[..., None, :] - centres).sum(-1).argmin(-1)
    ink = (pixels < GROUND).any(-1)
    counts = np.stack([((nearest == i) & ink).sum((1, 2)) for i in range(len(NAMED))], 1)
    shares: NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares
