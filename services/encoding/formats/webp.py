"""WebP: its one picture, or the first of an animation, and the orientation."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from services.encoding.formats.picture import Parts, Picture, exif_orientation, xmp_orientation
from services.errors import CorruptImage

# Seconds for a pixel: of a lossless file, put on white.
PIXEL_S = 4e-8
_LOSSY, _LOSSLESS, _EXTENDED = b"VP8 ", b"VP8L", b"VP8X"
# Flags of an extended file: that it has a colour profile, EXIF or XMP, none of which is kept; that it is animated.
_METADATA, _ANIMATED = 0b0010_1100, 0b0000_0010


def read(data: bytes, max_parts: int) -> Picture:
    """Return what of a WebP makes its picture.

    Parameters
    ----------
    data : bytes
        The file.
    max_parts : int
        Chunks that may come before the picture's last.

    Raises
    ------
    CorruptImage
        Where a chunk of the picture is damaged or missing.
    ImageTooCostly
        Where there are too many chunks.
    """
    parts, kept = Parts(max_parts), dict[bytes, memoryview]()
    exif = xmp = size = None
    last: tuple[bytes, ...] = (_LOSSY, _LOSSLESS)
    for kind, body, whole in _chunks(memoryview(data)):
        done = any(name in kept for name in last)
        if done and not parts.more():
            break
        if not done:
            parts.count()
        if kind == _EXTENDED and not kept and len(body) >= 10:
            size = tuple(int.from_bytes(body[place : place + 3], "little") + 1 for place in (4, 7))
            flags = bytes([body[0] & ~_METADATA & 0xFF])
            kept[kind] = memoryview(flags + bytes(body[1:]))
            last = (b"ANMF",) if body[0] & _ANIMATED else (_LOSSY, _LOSSLESS)
        elif not done and kind in (*last, b"ALPH", b"ANIM") and kind not in kept:
            if not whole:
                raise CorruptImage("a WebP that ends before all of its pixels")
            kept[kind] = body
            if size is None:
                size = _size(kind, body)
                last = (kind,)
        elif kind == b"EXIF" and exif is None:
            exif = exif_orientation(body)
        elif kind == b"XMP " and xmp is None:
            xmp = xmp_orientation(body)
    if size is None or not any(name in kept for name in last):
        raise CorruptImage("a WebP without pixels")
    width, height = size
    chunks = [chunk for kind, body in kept.items() for chunk in _packed(kind, body)]
    length = 4 + sum(map(len, chunks))
    return Picture(
        "WEBP",
        b"".join([b"RIFF", struct.pack("<I", length), b"WEBP", *chunks]),
        width,
        height,
        width * height * PIXEL_S,
        exif or xmp or 1,
    )


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview, bool]]:
    """Yield the kind and data of each chunk, and whether all of it is there."""
    place = 12
    while place + 8 <= len(view):
        length = int.from_bytes(view[place + 4 : place + 8], "little")
        body = view[place + 8 : place + 8 + length]
        yield bytes(view[place : place + 4]), body, len(body) == length
        place += 8 + length + length % 2


def _packed(kind: bytes, body: memoryview) -> list[bytes | memoryview]:
    return [kind, struct.pack("<I", len(body)), body, b"\0" * (len(body) % 2)]


def _size(kind: bytes, body: memoryview) -> tuple[int, int]:
    """Return width and height in pixels, as a simple file's only chunk has them."""
    if kind == _LOSSY and len(body) >= 10 and bytes(body[3:6]) == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == _LOSSLESS and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise CorruptImage("a WebP with a damaged header")
