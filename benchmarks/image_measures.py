"""How two pictures differ in colour, texture, structure and to an eye; how near a set of pictures is to another.

All take uint8 arrays [n, H, W, 3]. The network behind texture and perceptual distance is EfficientNet-Lite0 with its
ImageNet weights, which come as a package: LPIPS does not.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from training.imaging.colour import Pixels, lab
from training.judging.train import Backbone, as_batch

Row = Float[np.ndarray, " n"]

# Blocks of EfficientNet-Lite0 at a half, a quarter and an eighth of the side.
TAPS = (0, 2, 4)


def colour_distance(a: Pixels, b: Pixels) -> Row:
    """Return the earth mover's distance of the L*, a* and b* histograms, summed over the three; Lab units.

    In one dimension it is the mean distance of the sorted values, so no bins are needed.
    """
    x, y = (np.sort(lab(p).reshape(len(p), -1, 3), axis=1) for p in (a, b))
    return np.abs(x - y).mean(1).sum(1)


def structure_distance(a: Pixels, b: Pixels) -> Row:
    """Return 1 - the correlation of gradient magnitudes of luminance: where edges are, whatever their colour."""
    edges = []
    for pixels in (a, b):
        light = lab(pixels)[..., 0]
        gy, gx = np.gradient(light, axis=(1, 2))
        flat = np.hypot(gx, gy).reshape(len(pixels), -1)
        flat -= flat.mean(1, keepdims=True)
        edges.append(flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-9))
    return 1 - (edges[0] * edges[1]).sum(1)


class Eye:
    """Texture and perceptual distances by a network's early feature maps."""

    def __init__(self) -> None:
        self.backbone = Backbone()

    @torch.inference_mode()
    def maps(self, pixels: Pixels) -> list[Tensor]:
        """Return the feature maps at `TAPS`, each float32 [n, c, h, w]."""
        model = self.backbone.model
        x = model._swish(model._bn0(model._conv_stem(self.backbone.prepare(as_batch(pixels)))))
        found = []
        for i, block in enumerate(model._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if i in TAPS:
                found.append(x)
        return found

    def distances(self, a: Pixels, b: Pixels, batch: int = 64) -> tuple[Row, Row]:
        """Return texture and perceptual distances.

        Texture: relative distance of Gram matrices (Gatys et al., 2016), mean over maps. Perceptual: squared distance
        of maps at unit length in each position (Zhang et al., 2018, without their learnt weights), summed over maps.
        """
        texture, perceptual = [], []
        for start in range(0, len(a), batch):
            pairs = list(zip(*(self.maps(p[start : start + batch]) for p in (a, b)), strict=True))
            grams = [[torch.einsum("nchw,ndhw->ncd", m, m).flatten(1) for m in pair] for pair in pairs]
            texture.append(
                torch.stack([(x - y).norm(dim=1) / (x.norm(dim=1) + y.norm(dim=1)) for x, y in grams]).mean(0)
            )
            units = [[F.normalize(m, dim=1) for m in pair] for pair in pairs]
            perceptual.append(torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in units]).sum(0))
        return torch.cat(texture).numpy(), torch.cat(perceptual).numpy()

    def features(self, pixels: Pixels) -> Float[np.ndarray, "n 1280"]:
        """Return pooled features of the last map, for distances between sets."""
        return self.backbone.pooled(as_batch(pixels)).numpy()


def nearest(queries: Float[np.ndarray, "n d"], known: Float[np.ndarray, "m d"]) -> tuple[Row, np.ndarray]:
    """Return the cosine distance to the nearest known row, and which one it is.

    Parameters
    ----------
    queries, known : np.ndarray
        Features, of any length.
    """
    centre = known.mean(0)
    q, k = ((f - centre) / np.linalg.norm(f - centre, axis=1, keepdims=True) for f in (queries, known))
    similarity = q @ k.T
    return 1 - similarity.max(1), similarity.argmax(1)
