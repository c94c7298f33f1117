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
    host: Tensor
    source: Tensor
    result: Tensor
    graph: torch.cuda.CUDAGraph


class GraphedModule:
    """Runs a module on a GPU by one graph a shape of its input; from and to the CPU.

    Parameters
    ----------
    module : nn.Module
        On `device`, in eval mode; one tensor in, one out, without control flow that depends on values.
    device : torch.device
        A GPU.
    dtype : torch.dtype
        Of the module's floats.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._module = module
        self._device = device
        self._dtype = dtype
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        # One pool for all shapes: only one graph runs at a time, so that they may use the same memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """Return the module's output for `batch`, float32; both are on the CPU."""
        with self._lock, torch.cuda.device(self._device):
            recording = self._recordings.get(tuple(batch.shape))
            if recording is None:
                recording = self._recordings[tuple(batch.shape)] = self._record(batch)
            # Rounded on the way into page-locked memory, from where the GPU fetches half the bytes by itself.
            recording.host.copy_(batch)
            recording.source.copy_(recording.host, non_blocking=True)
            recording.graph.replay()
            # This waits for the graph, so that neither buffer is written while it is read.
            return recording.result.float().cpu()

    def _record(self, batch: Tensor) -> _Recording:
        dtype = self._dtype if batch.is_floating_point() else batch.dtype
        host = torch.empty(batch.shape, dtype=dtype, pin_memory=True)
        # Real values: token numbers out of nowhere would be read beyond the vocabulary.
        host.copy_(batch)
        source = host.to(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._module(source)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._module(source)
        return _Recording(host, source, result, graph)
