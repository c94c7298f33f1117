"""JPEG: its tables, frame and scans, how its colours are stored, and its orientation.

All other segments are stepped over unread. Each scan goes over every value of its components again, so a progressive
file of a few kilobytes can cost minutes: what the scans cost is known from their headers, before any is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from services.encoding.formats.picture import Parts, Picture, exif_orientation, xmp_orientation
from services.errors import CorruptImage

# Seconds for one value of one component in one scan, of the dearest kind: one that refines what is there.
VALUE_S = 2.5e-9
END = b"\xff\xd9"
# A 255 in the pixels has a 0 behind it; several before a marker fill up.
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MARKER_IN_PIXELS = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_EOI, _SOS, _DRI, _APP0, _APP1, _APP14 = 0xD9, 0xDA, 0xDD, 0xE0, 0xE1, 0xEE
# Huffman tables, arithmetic conditioning, quantisation tables.
_TABLES = {0xC4, 0xCC, 0xDB}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ARITHMETIC = set(range(0xC9, 0xD0)) - {0xCC}
# Markers without a segment: restarts, a second start, and one that means nothing.
_ALONE = {0x01, *range(0xD0, 0xD9)}
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# How the colours are stored, said anew, since what else these segments hold may be damaged.
_JFIF_SEGMENT = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE_SEGMENT = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
_COEFFICIENTS = 64


def read(data: bytes, max_parts: int) -> Picture:
    """Return what of a JPEG makes its picture.

    Parameters
    ----------
    data : bytes
        The file.
    max_parts : int
        Markers that it may have.

    Raises
    ------
    CorruptImage
        Where what makes the picture is damaged, or not all of it is there.
    ImageTooCostly
        Where there are too many markers.
    """
    walk = _Walk(data, Parts(max_parts))
    frame = walk.frame
    if frame is None or not walk.scans:
        raise CorruptImage("a JPEG that ends, or is damaged, before its pixels")
    if not walk.ended and not walk.may_be_whole():
        raise CorruptImage("a JPEG that ends before all of its pixels")
    start = [b"\xff\xd8"]
    if walk.jfif:
        start.append(_JFIF_SEGMENT)
    if walk.adobe is not None:
        start.append(_ADOBE_SEGMENT + bytes([walk.adobe]))
    values = walk.values + sum(map(frame.values, frame.sampling))
    return Picture(
        "JPEG",
        b"".join([*start, *walk.kept, END if walk.ended else b""]),
        frame.width,
        frame.height,
        # Decoded twice where its end is in doubt.
        values * VALUE_S * (1 if walk.ended else 2),
        walk.orientation or walk.xmp or 1,
        unended=not walk.ended,
    )


class _Frame:
    """The frame header: size, components, and which coefficients of each have come so far."""

    def __init__(self, marker: int, body: memoryview) -> None:
        if len(body) < 6 or len(body) < 6 + 3 * body[5] or not body[5]:
            raise CorruptImage("a JPEG with a damaged frame")
        self.height = int.from_bytes(body[1:3], "big")
        self.width = int.from_bytes(body[3:5], "big")
        self.progressive, self.arithmetic = marker in _PROGRESSIVE, marker in _ARITHMETIC
        entries = [body[place : place + 3] for place in range(6, 6 + 3 * body[5], 3)]
        self.sampling = {entry[0]: (entry[1] >> 4, entry[1] & 15) for entry in entries}
        if not all(1 <= across <= 4 and 1 <= down <= 4 for across, down in self.sampling.values()):
            raise CorruptImage("a JPEG with a damaged frame")
        self.most_across = max(across for across, _ in self.sampling.values())
        self.most_down = max(down for _, down in self.sampling.values())
        # Bits that are still to come of each coefficient; None before its first scan.
        self.missing: dict[int, list[int | None]] = {name: [None] * _COEFFICIENTS for name in self.sampling}

    def values(self, name: int) -> int:
        """Return how many values a component has, those that fill up the last blocks included."""
        across, down = self.sampling[name]
        return self._units() * across * down * _COEFFICIENTS

    def units(self, names: list[int]) -> int:
        """Return into how many units a scan of these components is divided, which restarts are counted in."""
        if len(names) > 1:
            return self._units()
        across, down = self.sampling[names[0]]
        return -(-self.width * across // (8 * self.most_across)) * -(
            -self.height * down // (8 * self.most_down)
        )

    def _units(self) -> int:
        return -(-self.width // (8 * self.most_across)) * -(-self.height // (8 * self.most_down))

    def scan(self, body: memoryview) -> list[int]:
        """Note what a scan brings and return its components."""
        count = body[0] if body else 0
        if not 1 <= count <= 4 or len(body) < 4 + 2 * count:
            raise CorruptImage("a JPEG with a damaged scan")
        names = list(body[1 : 1 + 2 * count : 2])
        first, last, bits = body[1 + 2 * count : 4 + 2 * count]
        if any(name not in self.sampling for name in names):
            raise CorruptImage("a JPEG with a scan of a component that its frame has not")
        for name in names:
            for place in (
                range(first, min(last + 1, _COEFFICIENTS)) if self.progressive else range(_COEFFICIENTS)
            ):
                self.missing[name][place] = bits & 15 if self.progressive else 0
        return names

    def complete(self) -> bool:
        """Return whether every bit of every coefficient had its scan."""
        return all(bits == 0 for missing in self.missing.values() for bits in missing)


class _Walk:
    """One pass over the segments; what is kept of them, and what they say."""

    def __init__(self, data: bytes, parts: Parts) -> None:
        self.kept: list[memoryview] = []
        self.frame: _Frame | None = None
        self.ended = self.jfif = False
        self.adobe: int | None = None
        self.orientation: int | None = None
        self.xmp: int | None = None
        # Values that the scans go over.
        self.values = self.scans = 0
        self._restart = self._units = 0
        self._pixels = memoryview(b"")
        for marker, body, pixels, segment in _segments(data, parts):
            self._take(marker, body)
            if marker in _TABLES or marker in _FRAMES or marker in (_DRI, _SOS):
                self.kept += [segment, pixels]
            if marker == _SOS:
                self._pixels = pixels

    def _take(self, marker: int, body: memoryview) -> None:
        name = bytes(body[: len(_XMP)])
        if marker == _EOI:
            self.ended = True
        elif marker in _FRAMES:
            if self.frame is not None:
                raise CorruptImage("a JPEG with two frames")
            self.frame = _Frame(marker, body)
        elif marker == _SOS:
            if self.frame is None:
                raise CorruptImage("a JPEG with a scan before its frame")
            names = self.frame.scan(body)
            self._units = self.frame.units(names)
            self.values += sum(map(self.frame.values, names))
            self.scans += 1
        elif marker == _DRI:
            self._restart = int.from_bytes(body[:2], "big")
        elif marker == _APP0 and name.startswith(b"JFIF\0"):
            self.jfif = True
        elif marker == _APP14 and name.startswith(b"Adobe") and len(body) >= 12:
            self.adobe = body[11]
        elif marker == _APP1 and name.startswith(_EXIF) and self.orientation is None:
            self.orientation = exif_orientation(body)
        elif marker == _APP1 and name == _XMP and self.xmp is None:
            self.xmp = xmp_orientation(body)

    def may_be_whole(self) -> bool:
        """Return whether every scan and restart is there; the last pixels may still be missing."""
        if self.frame is None or self.frame.arithmetic or not self.frame.complete():
            # The end of arithmetic coding may be left out, so what comes behind it cannot tell whether it is there.
            return False
        restarts = -(-self._units // self._restart) - 1 if self._restart else 0
        return len(_RESTART.findall(self._pixels)) >= restarts


def _segments(data: bytes, parts: Parts) -> Iterator[tuple[int, memoryview, memoryview, memoryview]]:
    """Yield each marker with its data, the pixels behind it, and the whole segment without them; end at a cut."""
    view, nothing, place = memoryview(data), memoryview(b""), 2
    while found := _MARKER.search(data, place):
        parts.count()
        marker, begin, place = found.group(1)[0], found.start(), found.end()
        if marker in _ALONE:
            continue
        if marker == _EOI:
            yield marker, nothing, nothing, nothing
            return
        end = place + int.from_bytes(view[place : place + 2], "big")
        if end < place + 2 or end > len(data):
            return
        body, segment, pixels = view[place + 2 : end], view[begin:end], nothing
        if marker == _SOS:
            following = _MARKER_IN_PIXELS.search(data, end)
            stop = following.start() if following else len(data.rstrip(b"\xff"))
            pixels = view[end:stop]
            end = max(end, stop)
        yield marker, body, pixels, segment
        place = end
