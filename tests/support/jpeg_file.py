"""A writer of JPEG files of flat blocks, from the specification alone: every sampling, colour storage and restart."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np


def segment(marker: int, data: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def _stuffed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""
    return data.replace(b"\xff", b"\xff\0")


def _difference(value: int) -> str:
    """The bits of a DC difference: its length as a code of four bits, then itself."""
    length = abs(value).bit_length()
    code = f"{length:04b}"
    return code + (f"{value if value > 0 else value + (1 << length) - 1:0{length}b}" if length else "")


def flat_jpeg(
    units: np.ndarray,
    sampling: Sequence[tuple[int, int]],
    *,
    size: tuple[int, int] | None = None,
    names: Sequence[int] | None = None,
    head: bytes = JFIF,
    restart: int = 0,
) -> bytes:
    """A baseline file whose units (MCUs) are each of one colour.

    Parameters
    ----------
    units
        Values of the stored components, (rows, columns, components).
    sampling
        Across and down, of each component.
    size
        Width and height in pixels; all of the units by default.
    names
        Ids of the components.
    head
        Segments behind the start.
    restart
        Units between two restart markers; 0 for none.
    """
    rows, columns, count = units.shape
    across, down = max(h for h, _ in sampling), max(v for _, v in sampling)
    width, height = size or (columns * across * 8, rows * down * 8)
    names = list(names or range(1, count + 1))
    out = b"\xff\xd8" + head + segment(0xDB, b"\0" + bytes([8] * 64))
    components = b"".join(bytes([n, h << 4 | v, 0]) for n, (h, v) in zip(names, sampling, strict=True))
    out += segment(0xC0, struct.pack(">BHHB", 8, height, width, count) + components)
    # Twelve codes of four bits, and one of one bit: the end of the block.
    out += segment(0xC4, bytes([0x00, 0, 0, 0, 12] + [0] * 12) + bytes(range(12)))
    out += segment(0xC4, bytes([0x10, 1] + [0] * 15) + b"\0")
    if restart:
        out += segment(0xDD, struct.pack(">H", restart))
    out += segment(0xDA, bytes([count]) + b"".join(bytes([n, 0]) for n in names) + bytes([0, 63, 0]))
    bits, last, marker = "", [0] * count, 0
    for number, unit in enumerate(units.reshape(-1, count).tolist()):
        if restart and number and number % restart == 0:
            out += _stuffed(bits) + bytes([0xFF, 0xD0 + marker])
            bits, last, marker = "", [0] * count, (marker + 1) % 8
        for i, (h, v) in enumerate(sampling):
            for _ in range(h * v):
                bits += _difference(unit[i] - 128 - last[i]) + "0"
                last[i] = unit[i] - 128
    return out + _stuffed(bits) + b"\xff\xd9"


def scans_jpeg(scans: int, width: int, height: int) -> bytes:
    """A progressive file of one component with so many scans that bring nothing, each as dear as one that does."""
    out = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    out += segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    out += segment(0xC4, bytes([0x00, 1] + [0] * 15) + b"\0")
    # One code: a run of 16,384 to 32,767 empty blocks, or of 1.
    out += segment(0xC4, bytes([0x10, 0, 2] + [0] * 14) + bytes([0xE0, 0x00]))
    blocks = -(-width // 8) * -(-height // 8)
    out += segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0x00])) + _stuffed("0" * blocks)
    run, left = "", blocks
    while left >= 16_384:
        taken = min(left, 32_767)
        run, left = run + "00" + format(taken - 16_384, "014b"), left - taken
    data = _stuffed(run + "01" * left)
    out += segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0x01])) + data
    return out + (segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0x10])) + data) * scans + b"\xff\xd9"
