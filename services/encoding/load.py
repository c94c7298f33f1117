"""Choosing a backend, and putting a model on it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from services.encoding.clip import ClipConfig
from services.encoding.torch_backend import TorchTowers, best_precision
from services.encoding.towers import Towers
from services.errors import UnsupportedModel

if TYPE_CHECKING:
    from services.encoding.openvino_backend import Converted


def choose_backend(device: str = "cpu") -> str:
    """Return the faster backend that is installed: torch on a GPU, openvino on a CPU, else torch."""
    if device.startswith("cuda") or importlib.util.find_spec("openvino") is None:
        return "torch"
    return "openvino"


def choose_device() -> str:
    """Return "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_device(backend: str, device: str) -> str:
    """Return the device that "auto" stands for; any other is returned as it is."""
    if device != "auto":
        return device
    return "cpu" if backend == "openvino" else choose_device()


def use_threads(threads: int) -> None:
    """Set the threads of torch, which runs the dictionaries whatever runs the towers. Ray would leave it one."""
    torch.set_num_threads(threads)


def build_towers(
    model: Any,
    config: ClipConfig,
    backend: str,
    *,
    device: str,
    threads: int,
    precision: str,
    converted: Converted | None = None,
) -> Towers:
    """Put a model on a backend.

    Parameters
    ----------
    model : nn.Module
        open_clip's model, in eval mode, float32, on the CPU; a GPU takes it away.
    config : ClipConfig
        Of the model.
    backend : {"torch", "openvino"}
        See `choose_backend`.
    device, threads, precision
        As `services.bundle.towers.load_towers`, the device resolved.
    converted : Converted or None
        As `OpenVINOTowers`.

    Raises
    ------
    UnsupportedModel
        Where backend, device and precision do not go together.
    """
    use_threads(threads)
    if backend == "torch":
        return TorchTowers(
            model,
            config,
            device=device,
            threads=threads,
            precision=best_precision(device) if precision == "auto" else precision,
        )
    if backend == "openvino":
        if device != "cpu":
            raise UnsupportedModel(f"openvino runs on the CPU, not on {device}")
        # Imported here: torch alone is enough to serve.
        from services.encoding.openvino_backend import OpenVINOTowers

        return OpenVINOTowers(model, config, threads=threads, precision=precision, converted=converted)
    raise UnsupportedModel(f"backend must be auto, torch or openvino, not {backend!r}")
