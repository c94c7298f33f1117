"""A module whose forwards are recorded once a shape and replayed: for a GPU, which waits for Python otherwise.

A forward of a tower is some hundreds of kernels of a few microseconds each; starting them one by one from Python takes
longer than they run for small batches. A CUDA graph starts all of them at once. It holds the addresses of what it
reads and writes, so its input is copied into place before, and its output out of place after.

Source: "CUDA semantics: CUDA Graphs" of PyTorch's documentation.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Forwards before a recording: libraries choose their algorithms and workspaces in the first ones.
_WARM_UP = 3


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    source: Tensor
    result: Tensor


class GraphedModule:
    """Runs a module on a GPU by one graph a shape of its input.

    Parameters
    ----------
    module : nn.Module
        On `device`, in eval mode; one tensor in, one out, without control flow that depends on values.
    device : torch.device
        A GPU.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        # One pool for all shapes: only one graph runs at a time, so that they may use the same memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """Return the module's output for `batch`, which is on the device; the caller owns it."""
        with self._lock:
            recording = self._recordings.get(tuple(batch.shape))
            if recording is None:
                recording = self._recordings[tuple(batch.shape)] = self._record(batch)
            recording.source.copy_(batch)
            recording.graph.replay()
            # Before another graph writes over it.
            return recording.result.clone()

    def _record(self, batch: Tensor) -> _Recording:
        source = batch.clone()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._module(source)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            result = self._module(source)
        return _Recording(graph, source, result)
