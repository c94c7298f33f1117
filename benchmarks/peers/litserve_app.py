"""LitServe as its documentation says: a LitAPI with dynamic batching.

`python litserve_app.py FOLDER PORT THREADS WORKERS TIMEOUT`: WORKERS processes, each with THREADS threads; a batch
waits TIMEOUT seconds for more requests.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import torch
from towers import ImageTower, to_base64


class Embedder(litserve.LitAPI):
    """Embeds the images of a request; requests are batched."""

    def __init__(self, folder: Path, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load the tower, once a worker."""
        self._tower = ImageTower(self._folder, self._threads)

    # Without a type: LitServe would take one written as text for that of a query.
    def decode_request(self, request):
        """Decode the images of one request, a tensor of all."""
        return self._tower.decode(request["images"])

    def batch(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Join the images of all requests."""
        return torch.cat(inputs), [len(item) for item in inputs]

    def predict(self, batch: tuple[torch.Tensor, list[int]]) -> tuple[np.ndarray[Any, Any], list[int]]:
        """Embed them together."""
        pixels, sizes = batch
        return self._tower.embed(pixels), sizes

    def unbatch(self, output: tuple[np.ndarray[Any, Any], list[int]]) -> list[np.ndarray[Any, Any]]:
        """Give each request its own."""
        embeddings, sizes = output
        return np.split(embeddings, np.cumsum(sizes)[:-1])

    def encode_response(self, output: np.ndarray[Any, Any]) -> dict[str, str]:
        """Return the embeddings of one request."""
        return {"embeddings": to_base64(output)}


if __name__ == "__main__":
    folder, port, threads, workers, timeout = sys.argv[1:]
    api = Embedder(Path(folder), int(threads), max_batch_size=32, batch_timeout=float(timeout))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers), timeout=600)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
