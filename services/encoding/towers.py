"""The interface of the towers, and how a batch is cut so that results do not depend on who else is in it.

A matrix product of another shape may add in another order. So a batch is run in chunks of a few fixed sizes
(powers of two, which also are all that a backend has to warm up), and a text is run at a length that depends
on that text alone. What difference remains is measured in ``tests/services/test_towers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_BATCH = 32
MIN_LENGTH = 8
END_TOKEN = 49407


@dataclass(frozen=True)
class Embeddings:
    """What a tower says of a batch.

    Attributes
    ----------
    unit : float32 array, shape (B, d)
        Embeddings of unit length.
    norm : float32 array, shape (B,)
        rho, their length before.
    """

    unit: NDArray[np.float32]
    norm: NDArray[np.float32]

    @classmethod
    def of(cls, raw: NDArray[np.float32]) -> Embeddings:
        """Split raw embeddings, shape (B, d), into direction and length."""
        norm = np.sqrt(np.einsum("bd,bd->b", raw, raw, dtype=np.float64))
        unit = raw / np.maximum(norm, np.finfo(np.float32).tiny)[:, None]
        return cls(unit.astype(np.float32), norm.astype(np.float32))


class Towers(Protocol):
    """The image and the text tower of one CLIP, on one backend.

    Attributes
    ----------
    backend, device, precision : str
        Such as "openvino", "cpu", "bf16".
    embed_dim : int
        d.
    image_size : (int, int)
        Height and width of the input, pixels.
    context_length : int
        Tokens.
    logit_scale : float
        The factor on cosines before a softmax (already exponentiated).
    """

    backend: str
    device: str
    precision: str
    embed_dim: int
    image_size: tuple[int, int]
    context_length: int
    logit_scale: float

    def encode_images(self, pixels: NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, shape (B, 3, H, W)."""

    def encode_texts(self, tokens: NDArray[np.int64]) -> Embeddings:
        """Embed tokens, shape (B, context)."""

    def warm_up(self, max_batch: int = MAX_BATCH) -> None:
        """Run every chunk size up to `max_batch` once, so that no caller pays for a first time."""

    def close(self) -> None:
        """Free the model's memory; the towers cannot be used again."""


def chunk_sizes(batch: int, largest: int = MAX_BATCH) -> list[int]:
    """Return powers of two that add up to `batch`, none over `largest`, big ones first (22 -> [16, 4, 2])."""
    sizes = [largest] * (batch // largest)
    rest = batch % largest
    return sizes + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def text_length(tokens: NDArray[np.int64], context_length: int) -> NDArray[np.int64]:
    """Return the length each text is run at: a power of two from 8, or the context length.

    `tokens` has shape (B, context). Under causal attention nothing after the end token, which has the highest
    number, reaches it, so leaving padding out is exact. (Padding is 0, but so is the token for "!".)
    """
    used = tokens.argmax(axis=1) + 1
    powers = np.exp2(np.ceil(np.log2(used)))
    lengths: NDArray[np.int64] = np.clip(powers, MIN_LENGTH, context_length).astype(np.int64)
    return lengths


def run_images(
    pixels: NDArray[np.float32], embed: Callable[[NDArray[np.float32]], NDArray[np.float32]], embed_dim: int
) -> Embeddings:
    """Run `embed` on chunks of the batch."""
    raw = np.empty((len(pixels), embed_dim), np.float32)
    start = 0
    for size in chunk_sizes(len(pixels)):
        raw[start : start + size] = embed(pixels[start : start + size])
        start += size
    return Embeddings.of(raw)


def run_texts(
    tokens: NDArray[np.int64],
    embed: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    embed_dim: int,
    trim: bool,
) -> Embeddings:
    """Run `embed` on chunks of the batch, texts of one length together.

    Parameters
    ----------
    tokens : int64 array, shape (B, context)
        Padded with zeros.
    embed : callable
        From tokens, shape (b, length), to raw embeddings, shape (b, d).
    embed_dim : int
        d.
    trim : bool
        Leave padding out; only where attention is causal.
    """
    raw = np.empty((len(tokens), embed_dim), np.float32)
    context_length = tokens.shape[1]
    lengths = text_length(tokens, context_length) if trim else np.full(len(tokens), context_length, np.int64)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        start = 0
        for size in chunk_sizes(len(members)):
            chunk = members[start : start + size]
            raw[chunk] = embed(np.ascontiguousarray(tokens[chunk, :length]))
            start += size
    return Embeddings.of(raw)


def warm_up(towers: Towers, max_batch: int, trim: bool) -> None:
    """Run each chunk size, and each text length, once."""
    size = 1
    while size <= min(max_batch, MAX_BATCH):
        towers.encode_images(np.zeros((size, 3, *towers.image_size), np.float32))
        length = MIN_LENGTH if trim else towers.context_length
        while True:
            length = min(length, towers.context_length)
            tokens = np.zeros((size, towers.context_length), np.int64)
            tokens[:, length - 1] = END_TOKEN
            towers.encode_texts(tokens)
            if length == towers.context_length:
                break
            length *= 2
        size *= 2
