"""A model without weights: deterministic, counting, and slow only when a test holds it."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.encoder.tasks import EncoderInfo
from services.check import Check
from services.dictionaries.base import SparseRow, sparse_rows
from services.encoding.formats.picture import Picture
from services.errors import CorruptImage, TextTooLong
from tests.support.waiting import PATIENCE_S

EMBED_DIM = 8


class DebugModel:
    """Embeds by hash; `held` stops it before each forward until `release` is called."""

    def __init__(self) -> None:
        self.forwards: list[int] = []
        self.prepared = 0
        self.smoothed = 0
        self._free = threading.Event()
        self._free.set()
        self.entered = threading.Semaphore(0)

    def hold(self) -> None:
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    @property
    def items(self) -> int:
        """Items that cost model time."""
        return sum(self.forwards)

    def prepare(self, item: bytes | str, truncate_text: bool) -> NDArray[Any]:
        self.prepared += 1
        if item == b"bad":
            raise CorruptImage("truncated or damaged PNG image")
        if isinstance(item, str) and len(item) > 100 and not truncate_text:
            raise TextTooLong("101 tokens; the context holds 100")
        if item == b"surprise":
            raise ZeroDivisionError("/secret/path/of/the/server")
        data = item.encode() if isinstance(item, str) else item
        return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)[:EMBED_DIM].astype(np.float32) + 1

    def tokenize(self, text: str, truncate: bool) -> NDArray[Any]:
        return self.prepare(text, truncate)

    def open(self, data: bytes) -> Picture:
        return Picture("PNG", data, 8, 8, 10.0 if data.startswith(b"costly") else 0.0)

    def decode(self, picture: Picture, check: Check) -> NDArray[Any]:
        return self.prepare(picture.data, False)

    def _encode(self, batch: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.entered.release()
        if not self._free.wait(PATIENCE_S):
            raise TimeoutError("the test never released the model")
        self.forwards.append(len(batch))
        norm = np.linalg.norm(batch, axis=1).astype(np.float32)
        return (batch / norm[:, None]).astype(np.float32), norm

    encode_images = encode_texts = _encode

    def noise(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        return pixels[:, 0].astype(np.float32)

    def smooth(self, pixels: NDArray[Any]) -> NDArray[Any]:
        self.smoothed += len(pixels)
        return np.roll(pixels, 1, axis=1)

    def info(self) -> EncoderInfo:
        return EncoderInfo("debug", "cpu", "fp32", 1, EMBED_DIM, 32, 16, 14.3, 0)

    def close(self) -> None:
        self.release()


class DebugDictionary:
    """Keeps the activations over 0.3, so that every input has another number of them."""

    n_features = EMBED_DIM

    def encode(self, e: torch.Tensor, modality: Any) -> torch.Tensor:
        return torch.where(e > 0.3, e, torch.zeros_like(e))

    def encode_sparse(self, e: torch.Tensor, modality: Any) -> list[SparseRow]:
        return sparse_rows(self.encode(e, modality))
