"""Files that are not what they seem, made by hand."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def encoded(size: tuple[int, int], kind: str) -> bytes:
    """Return a red image file of `size` (width, height, pixels)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def png_bomb(side: int) -> bytes:
    """Return a PNG of some kilobytes that unpacks to `side` x `side` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = bytes(1 + (side + 7) // 8)
    deflate = zlib.compressobj(9)
    pixels = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


TRUNCATED_PNG = encoded((64, 64), "PNG")[:100]
ONE_PIXEL = encoded((1, 1), "PNG")
BOMB = png_bomb(20_000)
GIF = encoded((64, 64), "GIF")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64" height="64"/></svg>'
TEXT_NAMED_PNG = b"This is a text, whatever the file is called.\n" * 4
