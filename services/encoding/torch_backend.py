"""Towers run by PyTorch, on a CPU or a GPU: the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.encoding.clip import ClipConfig
from services.encoding.cuda_graphs import GraphedModule
from services.encoding.text_tower import TextTower
from services.encoding.towers import MAX_BATCH, Embeddings, run_images, run_texts, warm_up
from services.errors import UnsupportedModel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def best_precision(device: str) -> str:
    """Return "bf16" on a GPU that has it natively, "f16" on an older one, "f32" on a CPU."""
    if not device.startswith("cuda"):
        return "f32"
    # Turing and older emulate it, at a fraction of the speed of half floats.
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "f16"


class TorchTowers:
    """See `services.encoding.towers.Towers`.

    Parameters
    ----------
    model : nn.Module
        open_clip's model, in eval mode.
    config : ClipConfig
        Of the model.
    device : str
        Such as "cpu" or "cuda:0".
    threads : int or None
        Intra-op threads of this process; None leaves them as they are. Ray sets one thread unless told
        otherwise.
    precision : {"f32", "bf16", "f16"}
        Of weights and activations. The half types are pure, not autocast, whose speed on a CPU is erratic.
    """

    backend = "torch"

    def __init__(
        self,
        model: Any,
        config: ClipConfig,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precision: str = "f32",
    ) -> None:
        if precision not in DTYPES:
            raise UnsupportedModel(f"precision must be one of {', '.join(DTYPES)}, not {precision!r}")
        if threads is not None:
            torch.set_num_threads(threads)
        if precision == "f32":
            # f32 means it: on a GPU convolutions would otherwise round their inputs to 10 bits (TF32).
            torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.precision = precision
        self.embed_dim = config.embed_dim
        self.image_size = config.image_size
        self.context_length = config.context_length
        self.logit_scale = float(model.logit_scale.exp())
        self._dtype = DTYPES[precision]
        text = TextTower(model)
        self._trim = text.causal
        self._image = runner(model.visual, torch.device(device), self._dtype)
        self._text = runner(text, torch.device(device), self._dtype)

    def encode_images(self, pixels: NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, shape (B, 3, H, W)."""
        return run_images(pixels, self._embed_images, self.embed_dim)

    def encode_texts(self, tokens: NDArray[np.int64]) -> Embeddings:
        """Embed tokens, shape (B, context)."""
        return run_texts(tokens, self._embed_texts, self.embed_dim, trim=self._trim)

    def warm_up(self, max_batch: int = MAX_BATCH) -> None:
        """Run every chunk size up to `max_batch` once."""
        warm_up(self, max_batch, self._trim)

    def close(self) -> None:
        """Free the model's memory."""
        del self._image, self._text
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _embed_images(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._image(torch.from_numpy(pixels)).numpy()

    def _embed_texts(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._text(torch.from_numpy(tokens)).numpy()


def runner(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Move a module to a device; return its forward, from a tensor on the CPU to float32 on the CPU."""
    module = module.to(device, dtype)
    if device.type == "cuda":
        # Pieces have few sizes and texts few lengths, so each shape can have a graph of its own.
        return GraphedModule(module, device, dtype)

    @torch.inference_mode()
    def run(batch: Tensor) -> Tensor:
        if batch.is_floating_point():
            batch = batch.to(device, dtype)
        result: Tensor = module(batch.to(device))
        return result.float().cpu()

    return run
