"""What a machine's arithmetic allows: the speed of plain matrix products, and how many of them an image takes."""

from __future__ import annotations

import time

import torch

from services.encoding.clip import ClipConfig


def matmul_flops(
    device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 2.0, side: int = 0
) -> float:
    """Return floating point operations a second of products of square matrices.

    Parameters
    ----------
    device, dtype
        Of the matrices.
    seconds : float
        To measure for.
    side : int
        Of the matrices; 0 takes 1,024 on a CPU and 8,192 on a GPU, large enough to fill either.
    """
    gpu = device.startswith("cuda")
    side = side or (8_192 if gpu else 1_024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def run(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b)
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    run(2)
    # A GPU is asked for many at once: waiting for each would measure the asking.
    together = 20 if gpu else 1
    count, spent = 0, 0.0
    while spent < seconds:
        spent += run(together)
        count += together
    return 2.0 * side**3 * count / spent


def image_flops(config: ClipConfig) -> float:
    """Return the floating point operations of one forward of a ViT image tower; a multiply-add is two."""
    vision = config.model_cfg["vision_cfg"]
    width, layers, patch = vision["width"], vision["layers"], vision["patch_size"]
    patches = (config.image_size[0] // patch) * (config.image_size[1] // patch)
    tokens = patches + 1
    # Query, key, value and output; the MLP's two; scores and their sum over values.
    block = tokens * (4 * width**2 + 8 * width**2) + 2 * tokens**2 * width
    return float(2 * (layers * block + patches * 3 * patch**2 * width + width * config.embed_dim))
