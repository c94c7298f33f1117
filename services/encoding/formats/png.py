"""PNG: its critical chunks, transparency and orientation.

All other chunks are stepped over unread, whatever is in them: text, colour profiles, gamma. What damages the picture is
refused as libpng refuses it; an ancillary chunk that is damaged is passed over, as libpng does.
"""

from __future__ import annotations

import struct
import zlib

from services.encoding.formats.picture import Parts, Picture, exif_orientation, xmp_orientation
from services.errors import CorruptImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Seconds for a byte of the unpacked picture: inflated, unfiltered by the dearest filter, and put on white.
BYTE_S = 8e-9
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGB_ALPHA: 4}
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _PALETTE: (1, 2, 4, 8)}
_XMP = b"XML:com.adobe.xmp\0\0\0"
# How ImageMagick kept EXIF before PNG had a chunk for it: lines of hexadecimal, compressed.
_RAW_EXIF = b"Raw profile type exif\0\0"
# Bytes unpacked of such a profile: its first directory is within EXIF's 64 KiB, written in twice as many digits.
_RAW_EXIF_BYTES = 140_000


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk with its length and checksum."""
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))


def read(data: bytes, max_parts: int) -> Picture:
    """Return what of a PNG makes its picture.

    Parameters
    ----------
    data : bytes
        The file.
    max_parts : int
        Chunks that may come before the last of the pixels.

    Raises
    ------
    CorruptImage
        Where a critical chunk is damaged, missing or unknown.
    ImageTooCostly
        Where there are too many chunks.
    """
    walk = _Walk(data, Parts(max_parts))
    header = walk.header
    if not walk.pixels:
        raise CorruptImage("a PNG without pixels")
    if header.colour == _PALETTE and walk.palette is None:
        raise CorruptImage("a PNG of palette colours without its palette")
    kept: list[bytes | memoryview] = [SIGNATURE, chunk(b"IHDR", header.packed)]
    transparent = None
    if walk.palette is not None and header.colour == _PALETTE:
        # Whole, so that an index beyond its end is black, as libpng has it, and not what Pillow's palettes begin as.
        kept.append(chunk(b"PLTE", walk.palette.ljust(3 << header.depth, b"\0")))
        if 0 < len(walk.transparency) <= len(walk.palette) // 3:
            kept.append(chunk(b"tRNS", walk.transparency))
    elif header.colour in (_GREY, _RGB) and len(walk.transparency) == 2 * header.channels:
        values = struct.unpack(f">{header.channels}H", walk.transparency)
        # Of a value wider than the depth the lower bits count.
        transparent = tuple(value & ((1 << header.depth) - 1) for value in values)
    # Their checksums were compared; Pillow does not look at this one.
    size = struct.pack(">I", sum(map(len, walk.pixels)))
    kept += [size, b"IDAT", *walk.pixels, b"\0\0\0\0", chunk(b"IEND", b"")]
    values_read = header.width * header.height * max(1, header.channels * header.depth // 8)
    if transparent is not None and header.depth == 16 and header.colour == _RGB:
        # Decoded twice: see `services.encoding.images`.
        values_read *= 2
    return Picture(
        "PNG",
        b"".join(kept),
        header.width,
        header.height,
        values_read * BYTE_S,
        walk.orientation,
        transparent,
        header.depth,
    )


class _Header:
    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        if len(packed) != 13:
            raise CorruptImage("a PNG with a damaged header")
        self.width, self.height, self.depth, self.colour, *rest = struct.unpack(">IIBBBBB", packed)
        if self.colour not in _CHANNELS or self.depth not in _DEPTHS.get(self.colour, (8, 16)):
            raise CorruptImage(
                f"a PNG of colour type {self.colour} with {self.depth} bits, which does not exist"
            )
        if rest[:2] != [0, 0] or rest[2] > 1:
            raise CorruptImage("a PNG compressed, filtered or interlaced in an unknown way")
        self.channels = _CHANNELS[self.colour]


class _Walk:
    """One pass over the chunks."""

    def __init__(self, data: bytes, parts: Parts) -> None:
        self._data = memoryview(data)
        self._parts = parts
        self.palette: bytes | None = None
        self.transparency = b""
        self.pixels: list[memoryview] = []
        self._last = 0
        self.orientation = 1
        first, body, place = self._chunk(8)
        if first != b"IHDR" or not self._intact(8):
            raise CorruptImage("a PNG with a damaged header")
        self.header = _Header(bytes(body))
        self._walk(place)

    def _chunk(self, place: int) -> tuple[bytes, memoryview, int]:
        """Return the kind and data of the chunk at `place`, and the place of the next."""
        head = self._data[place : place + 8]
        if len(head) < 8:
            return b"", head, len(self._data)
        length = int.from_bytes(head[:4], "big")
        return bytes(head[4:]), self._data[place + 8 : place + 8 + length], place + 12 + length

    def _intact(self, place: int) -> bool:
        """Return whether the checksum of the chunk at `place` is there and right."""
        length = int.from_bytes(self._data[place : place + 4], "big")
        end = place + 8 + length
        checksum = self._data[end : end + 4]
        return len(checksum) == 4 and zlib.crc32(self._data[place + 4 : end]) == int.from_bytes(
            checksum, "big"
        )

    def _walk(self, place: int) -> None:
        xmp = 1
        exif: int | None = None
        while place < len(self._data):
            kind, body, following = self._chunk(place)
            if self.pixels and (kind == b"IEND" or not kind.isalpha() or not self._parts.more()):
                # What is no chunk behind the pixels was appended, or is where the file was cut off.
                break
            if not self.pixels:
                self._parts.count()
            if kind == b"IDAT":
                self._take_pixels(place, body, following)
            elif kind == b"PLTE":
                self._take_palette(place, body)
            elif kind == b"tRNS":
                self._take_transparency(place, body)
            elif kind == b"eXIf" and self._intact(place):
                exif = exif_orientation(body)
            elif kind == b"iTXt" and bytes(body[: len(_XMP)]) == _XMP:
                xmp = xmp_orientation(body) or 1
            elif kind == b"zTXt" and exif is None and bytes(body[: len(_RAW_EXIF)]) == _RAW_EXIF:
                exif = _raw_exif_orientation(body)
            elif not kind.isalpha() or (kind[0] < 0x60 and not self.pixels):
                raise CorruptImage("a PNG with a damaged or unknown critical chunk before its pixels")
            place = following
        self.orientation = exif or xmp

    def _take_pixels(self, place: int, body: memoryview, following: int) -> None:
        if self.pixels and self._last != place:
            # Pixels that come after something else do not count, as libpng has it.
            return
        self._last = following
        # Cut off within its data or its checksum there is no checksum to compare: all pixels may be there all the same,
        # and where they are not, the decoder says so.
        if following <= len(self._data) and not self._intact(place):
            raise CorruptImage("a PNG whose pixels are damaged: wrong checksum")
        self.pixels.append(body)

    def _take_palette(self, place: int, body: memoryview) -> None:
        if self.header.colour != _PALETTE or self.pixels:
            return
        if not self._intact(place) or len(body) % 3 or not 0 < len(body) <= 768 or self.palette is not None:
            raise CorruptImage("a PNG with a damaged palette")
        self.palette = bytes(body[: 3 << self.header.depth])

    def _take_transparency(self, place: int, body: memoryview) -> None:
        in_place = not self.pixels and (self.header.colour != _PALETTE or self.palette is not None)
        if in_place and not self.transparency and len(body) <= 256 and self._intact(place):
            self.transparency = bytes(body)


def _raw_exif_orientation(body: memoryview) -> int | None:
    try:
        lines = zlib.decompressobj().decompress(body[len(_RAW_EXIF) :], _RAW_EXIF_BYTES).split(b"\n")
        # An empty line, the profile's name, its length, then the digits; "Exif\0\0" comes first.
        digits = b"".join(lines[3:])
        return exif_orientation(bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))[6:])
    except (zlib.error, ValueError):
        return None
