"""Towers run by OpenVINO: the faster backend on a CPU.

The towers are converted in memory from the PyTorch ones when a process starts; nothing is cached on disk,
because conversion and compilation take seconds and a cache would be one more artefact to verify.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from services.encoding.clip import ClipConfig
from services.encoding.text_tower import TextTower
from services.encoding.towers import MAX_BATCH, Embeddings, run_images, run_texts, warm_up
from services.errors import UnsupportedModel

# OpenVINO reports its use to its makers from its import on, without asking; where its telemetry cannot be imported it
# falls back to a stub of its own. So import it from this module and nowhere else.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

DEVICE = "CPU"


def best_precision(core: ov.Core) -> str:
    """Return "bf16" where this CPU has it natively, else "f32" (emulated bf16 is slower and rounder)."""
    return "bf16" if "BF16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES") else "f32"


@dataclass(frozen=True)
class Converted:
    """Both towers as OpenVINO has them, not compiled yet; `causal` as of `TextTower`."""

    image: ov.Model
    text: ov.Model
    causal: bool


def convert_towers(model: Any, config: ClipConfig) -> Converted:
    """Convert open_clip's model, in eval mode, float32, on the CPU."""
    text = TextTower(model)
    height, width = config.image_size
    length = -1 if text.causal else config.context_length
    pixels = torch.zeros(2, 3, height, width)
    tokens = torch.ones(2, config.context_length, dtype=torch.int64)
    return Converted(
        convert(model.visual, pixels, [-1, 3, height, width]),
        convert(text, tokens, [-1, length]),
        text.causal,
    )


class OpenVINOTowers:
    """See `services.encoding.towers.Towers`.

    Parameters
    ----------
    model : nn.Module
        open_clip's model, in eval mode, float32, on the CPU.
    config : ClipConfig
        Of the model.
    threads : int or None
        Inference threads; None lets OpenVINO take all cores.
    precision : {"auto", "f32", "bf16"}
        Of the arithmetic; see `best_precision` for "auto".
    converted : Converted or None
        The model as `convert_towers` returns it, for whoever compiles it more than once; None converts it.
    """

    backend = "openvino"
    device = "cpu"

    def __init__(
        self,
        model: Any,
        config: ClipConfig,
        *,
        threads: int | None = None,
        precision: str = "auto",
        converted: Converted | None = None,
    ) -> None:
        if precision not in ("auto", "f32", "bf16"):
            raise UnsupportedModel(f"precision must be auto, f32 or bf16, not {precision!r}")
        core = ov.Core()
        self.precision = best_precision(core) if precision == "auto" else precision
        self.embed_dim = config.embed_dim
        self.image_size = config.image_size
        self.context_length = config.context_length
        self.logit_scale = float(model.logit_scale.exp())
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": self.precision,
            # Replicas on one machine would all be pinned to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        converted = converted or convert_towers(model, config)
        self._trim = converted.causal
        self._image = core.compile_model(converted.image, DEVICE, options)
        self._text = core.compile_model(converted.text, DEVICE, options)

    def encode_images(self, pixels: NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, shape (B, 3, H, W)."""
        return run_images(pixels, lambda chunk: self._infer(self._image, chunk), self.embed_dim)

    def encode_texts(self, tokens: NDArray[np.int64]) -> Embeddings:
        """Embed tokens, shape (B, context)."""
        return run_texts(
            tokens, lambda chunk: self._infer(self._text, chunk), self.embed_dim, trim=self._trim
        )

    def warm_up(self, max_batch: int = MAX_BATCH) -> None:
        """Run every chunk size up to `max_batch` once: OpenVINO compiles kernels for each shape it meets."""
        warm_up(self, max_batch, self._trim)

    def close(self) -> None:
        """Free the models' memory."""
        del self._image, self._text

    @staticmethod
    def _infer(
        model: ov.CompiledModel, batch: NDArray[np.float32] | NDArray[np.int64]
    ) -> NDArray[np.float32]:
        # A request of its own, as one request may not be used by two threads at once.
        result = model.create_infer_request().infer([np.ascontiguousarray(batch)])
        return np.asarray(result[0], dtype=np.float32)


def convert(module: nn.Module, example: torch.Tensor, shape: list[int]) -> ov.Model:
    """Convert a PyTorch module to an OpenVINO model with the input `shape`, -1 being free."""
    with torch.inference_mode(), warnings.catch_warnings():
        # Tracing warns of every check of a shape in the layers; the shapes that may vary are tested to.
        warnings.simplefilter("ignore")
        # A function is traced in a tenth of the time of a module, each of whose parts would be described first. The
        # check is left to the tests: it runs all again, and imports torch's compiler to compare.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            lambda batch: module(batch), example, check_trace=False
        )
        model: ov.Model = ov.convert_model(traced, example_input=example, input=[ov.PartialShape(shape)])
    return model
