"""A writer of PNG files of every kind, from the specification alone: what decoders are compared with."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
KINDS = [
    *((GREY, depth) for depth in (1, 2, 4, 8, 16)),
    *((PALETTE, depth) for depth in (1, 2, 4, 8)),
    *((colour, depth) for colour in (RGB, GREY_ALPHA, RGB_ALPHA) for depth in (8, 16)),
]
# Where the pixels of each pass begin and how far apart they are, across and down.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, data: bytes = b"", wrong_checksum: bool = False) -> bytes:
    checksum = zlib.crc32(kind + data) ^ wrong_checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def header(width: int, height: int, depth: int, colour: int, interlaced: bool = False) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def _packed(row: np.ndarray, depth: int) -> bytes:
    """The bytes of one row of values."""
    if depth == 16:
        return row.astype(">u2").tobytes()
    if depth == 8:
        return row.astype(np.uint8).tobytes()
    bits = "".join(f"{value:0{depth}b}" for value in row.ravel())
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))


def _filtered(row: bytes, above: bytes, kind: int, step: int) -> bytes:
    def at(data: bytes, place: int) -> int:
        return data[place] if place >= 0 else 0

    out = bytearray([kind])
    for i, value in enumerate(row):
        left, up, corner = at(row, i - step), above[i], at(above, i - step)
        predicted = (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]
        out.append((value - predicted) & 255)
    return bytes(out)


def pixels(values: np.ndarray, depth: int, interlaced: bool, filters: tuple[int, ...]) -> bytes:
    """The image data, unpacked: values is (height, width, channels)."""
    height, width, channels = values.shape
    step = max(1, channels * depth // 8)
    out, number = [], 0
    for x, y, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = values[y::down, x::across]
        if not part.size:
            continue
        above = bytes(len(_packed(part[0], depth)))
        for row in part:
            packed = _packed(row, depth)
            out.append(_filtered(packed, above, filters[number % len(filters)], step))
            above, number = packed, number + 1
    return b"".join(out)


def png(
    values: np.ndarray,
    depth: int,
    colour: int,
    *,
    interlaced: bool = False,
    filters: tuple[int, ...] = (0, 1, 2, 3, 4),
    palette: bytes = b"",
    transparency: bytes = b"",
    before: bytes = b"",
    after: bytes = b"",
    pieces: int = 1,
) -> bytes:
    """A whole file; `before` and `after` are chunks on either side of the pixels, which lie in so many chunks."""
    height, width, _ = values.shape
    data = zlib.compress(pixels(values, depth, interlaced, filters))
    size = -(-len(data) // pieces)
    return b"".join(
        [
            SIGNATURE,
            header(width, height, depth, colour, interlaced),
            chunk(b"PLTE", palette) if palette else b"",
            chunk(b"tRNS", transparency) if transparency else b"",
            before,
            *(chunk(b"IDAT", data[start : start + size]) for start in range(0, len(data), size)),
            after,
            chunk(b"IEND"),
        ]
    )
