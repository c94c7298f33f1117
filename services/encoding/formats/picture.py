"""What the formats have in common: the parts of a file that make its picture, and the EXIF orientation."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.errors import ImageTooCostly

ORIENTATION_TAG = 0x0112
# As XMP writes it, where a file has no EXIF: an attribute or an element.
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)([1-8])")
# Of a TIFF directory's entry; `value` is the whole of a SHORT or LONG of one element.
_ENTRY = [("tag", "u2"), ("kind", "u2"), ("count", "u4"), ("value", "u4")]
_SHORT, _LONG = 3, 4


@dataclass(frozen=True, slots=True)
class Picture:
    """The parts of a file that its pixels come from.

    Attributes
    ----------
    kind : str
        "PNG", "JPEG" or "WEBP", as Pillow calls it.
    data : bytes
        A file of the same pixels without metadata.
    width, height : int
        Pixels, as stored.
    seconds : float
        What decoding costs one core, by estimate: the values that the decoder goes through, times what one takes. An
        estimate of the file alone, so that all machines refuse the same pictures.
    orientation : int
        As EXIF has it, 1 to 8.
    transparent : tuple of int or None
        The one colour of a PNG that is transparent, in its own depth; None for none, and for a palette, which Pillow
        sees to.
    depth : int
        Bits of a value.
    unended : bool
        Whether the end marker of a JPEG is missing, and with it perhaps the end of its pixels.
    """

    kind: str
    data: bytes
    width: int
    height: int
    seconds: float
    orientation: int = 1
    transparent: tuple[int, ...] | None = None
    depth: int = 8
    unended: bool = False


class Parts:
    """Counts the chunks or markers of a file: each takes about a microsecond to step over.

    Parameters
    ----------
    at_most : int
        A file with more is refused.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most = self._left = at_most

    def more(self) -> bool:
        """Count one more and return whether it is still one of those allowed."""
        self._left -= 1
        return self._left >= 0

    def count(self) -> None:
        """Count one more part, or raise.

        Raises
        ------
        ImageTooCostly
            Where there are too many.
        """
        if not self.more():
            raise ImageTooCostly(f"more than {self._at_most} chunks or markers")


def exif_orientation(exif: bytes | memoryview) -> int | None:
    """Return the orientation in the first directory of EXIF data; None where it has none.

    Damaged EXIF has none, and the picture is then shown as stored, as viewers do.
    """
    if exif[:6] == b"Exif\0\0":
        exif = exif[6:]
    orders: dict[bytes, Literal["<", ">"]] = {b"II": "<", b"MM": ">"}
    order = orders.get(bytes(exif[:2]))
    if order is None or len(exif) < 8:
        return None
    place = struct.unpack_from(order + "I", exif, 4)[0]
    if place + 2 > len(exif):
        return None
    entries = min(struct.unpack_from(order + "H", exif, place)[0], (len(exif) - place - 2) // 12)
    kind = np.dtype(_ENTRY).newbyteorder(order)
    directory = np.frombuffer(exif, kind, entries, place + 2)
    found = directory[(directory["tag"] == ORIENTATION_TAG) & (directory["count"] == 1)]
    if not len(found) or found["kind"][0] not in (_SHORT, _LONG):
        return None
    value = int(found["value"][0])
    if order == ">" and found["kind"][0] == _SHORT:
        value >>= 16
    elif found["kind"][0] == _SHORT:
        value &= 0xFFFF
    return value if 1 <= value <= 8 else None


def xmp_orientation(xmp: bytes | memoryview) -> int | None:
    """Return the orientation in an XMP packet; None where it has none."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found.group(1)) if found else None
