"""From the contract's messages to work for the encoder, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from google.protobuf import duration_pb2
from monofacet.v1 import common_pb2
from numpy.typing import NDArray

from deployments.encoder.tasks import Features
from services.errors import InvalidInput

_ITEM = re.compile(r"\[(\d+)\](?:\.(.*))?")


def items_of(inputs: Iterable[common_pb2.Input]) -> tuple[bytes | str, ...]:
    """Return each input's file bytes or text; the inputs have been validated."""
    return tuple(i.image.data if i.WhichOneof("input") == "image" else i.text for i in inputs)


def check_texts(items: Iterable[bytes | str], max_bytes: int, truncate: bool) -> None:
    """Raise InvalidInput for every text of more than `max_bytes` of UTF-8; paths start at the item.

    Where texts may be cut none is too long; the encoder reads no more of one than it needs.
    """
    named = {f"[{i}].text": item for i, item in enumerate(items) if isinstance(item, str)}
    check_named_texts(named, max_bytes, truncate)


def check_named_texts(texts: Mapping[str, str], max_bytes: int, truncate: bool) -> None:
    """As `check_texts`, of texts by their field paths."""
    if truncate:
        return
    long = [
        (path, f"the text has more than {max_bytes} bytes, and truncate_text is not set")
        for path, text in texts.items()
        if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes
    ]
    if long:
        raise InvalidInput(long[0][1], long, reason="TEXT_TOO_LONG")


def relocated(error: InvalidInput, place: Callable[[int], str]) -> InvalidInput:
    """Return `error` with field paths that start at the request instead of at the item.

    Parameters
    ----------
    error
        With paths such as `[2].image.data`.
    place
        Path of an item in the request by its number: `inputs[2]`.
    """

    def move(path: str) -> str:
        match = _ITEM.fullmatch(path)
        if match is None:
            return path
        inner = match.group(2)
        where = place(int(match.group(1)))
        return f"{where}.{inner}" if inner else where

    return error.moved(move)


def tensor(array: NDArray[np.float32]) -> common_pb2.Tensor:
    """Return `array` as a message: float32, little-endian, row-major."""
    return common_pb2.Tensor(
        dtype=common_pb2.DATA_TYPE_FLOAT32,
        shape=array.shape,
        data=np.ascontiguousarray(array, dtype="<f4").tobytes(),
    )


def sparse(dictionary: str, features: Features) -> common_pb2.SparseFeatures:
    """Return the active features of one item as a message."""
    return common_pb2.SparseFeatures(
        dictionary=dictionary, indices=features.indices.tolist(), values=features.values.tolist()
    )


def duration(seconds: float) -> duration_pb2.Duration:
    """Return a span of time as a message; never negative."""
    whole, part = divmod(max(0, round(seconds * 1e9)), 1_000_000_000)
    return duration_pb2.Duration(seconds=whole, nanos=part)


def timings(queue_s: float = 0.0, inference_s: float = 0.0) -> common_pb2.Timings:
    """Return where the time went, in seconds, as a message."""
    return common_pb2.Timings(queue=duration(queue_s), inference=duration(inference_s))
