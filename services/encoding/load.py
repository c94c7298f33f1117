"""Choosing a backend and loading a bundle's towers on it."""

from __future__ import annotations

import importlib.util
import os

import torch

from services.bundle import Bundle
from services.encoding.clip import build_clip
from services.encoding.torch_backend import TorchTowers
from services.encoding.towers import Towers
from services.errors import UnsupportedModel


def choose_backend(device: str = "cpu") -> str:
    """Return the faster backend that is installed: torch on a GPU, openvino on a CPU, else torch."""
    if device.startswith("cuda") or importlib.util.find_spec("openvino") is None:
        return "torch"
    return "openvino"


def choose_device() -> str:
    """Return "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_towers(
    bundle: Bundle,
    backend: str = "auto",
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> Towers:
    """Load a bundle's towers.

    Parameters
    ----------
    bundle : Bundle
        Verified.
    backend : {"auto", "torch", "openvino"}
        See `choose_backend`.
    device : str
        "auto", "cpu", "cuda" or "cuda:<i>"; openvino runs on the CPU only.
    threads : int or None
        Threads of one forward; None takes all the cores this process may use.
    precision : {"auto", "f32", "bf16", "f16"}
        "auto" is f32 for torch; for openvino bf16 where the CPU has it, else f32. f16 is for torch on a GPU.

    Raises
    ------
    UnsupportedModel
        Where backend, device and precision do not go together.
    """
    if device == "auto":
        device = "cpu" if backend == "openvino" else choose_device()
    if backend == "auto":
        backend = choose_backend(device)
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    model = build_clip(bundle.clip_config, bundle.clip_weights)
    if backend == "torch":
        return TorchTowers(
            model,
            bundle.clip_config,
            device=device,
            threads=threads,
            precision="f32" if precision == "auto" else precision,
        )
    if backend == "openvino":
        if device != "cpu":
            raise UnsupportedModel(f"openvino runs on the CPU, not on {device}")
        # Imported here: torch alone is enough to serve.
        from services.encoding.openvino_backend import OpenVINOTowers

        return OpenVINOTowers(model, bundle.clip_config, threads=threads, precision=precision)
    raise UnsupportedModel(f"backend must be auto, torch or openvino, not {backend!r}")
