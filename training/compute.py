"""Where training runs, and in which precision: a GPU where there is one, and bfloat16 where it is native."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is a GPU where torch finds one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """Return the precision of products and convolutions.

    Parameters
    ----------
    device : torch.device
        Where they run.
    name : {"auto", "bf16", "f32"}
        "auto" is bf16 on a GPU and on a CPU with AMX tiles, which multiplies it ten times faster than float32; on other
        CPUs bf16 is emulated, and slower.
    """
    if name == "auto":
        native = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        name = "bf16" if native else "f32"
    return {"bf16": torch.bfloat16, "f32": torch.float32}[name]


def mixed(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return a context in which products run in `precision`, and what needs float32 stays in it."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def coarse_products(precision: torch.dtype) -> Iterator[None]:
    """For the length of a block, let float32 products round their factors where `precision` is bfloat16.

    Sums stay in float32, which autocast's do not: logits in the tens would be rounded to tenths.
    """
    before = torch.get_float32_matmul_precision()
    if precision == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
