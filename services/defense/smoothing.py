"""What is done with the pixels: a picture with its noise smoothed away and its edges kept, and how noisy it is.

An attack within a small budget lives in differences between neighbours that are smaller than any edge. A bilateral
filter averages those and leaves edges alone, so a clean drawing hardly changes and an attack loses part of itself.

Source: Tomasi and Manduchi, "Bilateral filtering for gray and color images" (1998), with a flat spatial kernel of
3 x 3; as a detector by comparison, Xu et al., "Feature squeezing" (2018).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from services.defense.scores import SIGMA

_NEIGHBOURS = tuple((dy, dx) for dy in range(3) for dx in range(3))


def smooth(images: Float[Tensor, "B 3 H W"], sigma: float = SIGMA) -> Float[Tensor, "B 3 H W"]:
    """Return sum_q w_q x_q / sum_q w_q over the 3 x 3 pixels q around each, w_q = exp(-|x_q - x|^2 / (2 sigma^2)).

    Differentiable, so that an attack may go through it.

    Parameters
    ----------
    images : float tensor
        In [0, 1].
    sigma : float
        In the same units; |.| is over the three channels.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for dy, dx in _NEIGHBOURS:
        neighbour = padded[:, :, dy : dy + height, dx : dx + width]
        weight = torch.exp((neighbour - images).square().sum(1, keepdim=True) / (-2 * sigma**2))
        total = total + weight * neighbour
        weights = weights + weight
    return total / weights


def checkerboard(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
    """Return how much colour alternates within each 2 x 2 window, in pixel levels; h = H - 1, w = W - 1.

    With u = x - (mean of x over channels), the colour without the brightness, it is the mean over channels of
    |u_11 - u_12 - u_21 + u_22|. Flat ground and straight edges have none; nor has the noise of a JPEG, which stores
    colour at half the resolution; independent noise in every channel has it everywhere.
    """
    down = images[..., 1:, :] - images[..., :-1, :]
    corners = down[..., 1:] - down[..., :-1]
    # The mean of the channels' differences is the difference of their means, so u itself is never made.
    return 255 * (corners - corners.mean(1, keepdim=True)).abs().mean(1)


def noise(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Return r4: the lower quartile over windows of `checkerboard`, in pixel levels (0 to 510).

    0 where a quarter of the picture is flat, as in most drawings, and of the size of the noise where there is colour
    noise everywhere. A constant that is added to a channel changes nothing.
    """
    levels = checkerboard(images).flatten(1)
    if levels.requires_grad or levels.is_cuda:
        return levels.quantile(0.25, dim=1)
    # Torch sorts for a quantile; numpy selects, in a tenth of the time.
    return torch.from_numpy(np.quantile(levels.numpy(), 0.25, axis=1)).to(levels.dtype)
