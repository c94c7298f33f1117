"""WebP files: what of them makes the picture, and the bounds on what they may cost."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from services.encoding.images import ImageLimits, decode_image
from services.errors import CorruptImage, ImageTooCostly, ImageTooLarge
from tests.services.test_jpeg import ORIENTED
from tests.services.test_png import orientation_entry

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
PICTURE = Image.fromarray(PIXELS, "RGBA")


def encoded(image: Image.Image = PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **{"lossless": True, "exact": True, **options})
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def extended(
    image: bytes, *around: bytes, flags: int = 0b0011_1100, size: tuple[int, int] = (30, 20)
) -> bytes:
    """An extended file around the only chunk of a simple one; `around` are chunks before and after it."""
    header = bytes([flags, 0, 0, 0]) + b"".join((side - 1).to_bytes(3, "little") for side in size)
    return riff(chunk(b"VP8X", header), *around[:-1], image[12:], around[-1])


SIMPLE = encoded(PICTURE.convert("RGB"))
PLAIN = np.asarray(decode_image(SIMPLE))
FILES = {
    "lossless": SIMPLE,
    "lossless with alpha": encoded(),
    "lossy": encoded(PICTURE.convert("RGB"), lossless=False),
    "lossy with alpha": encoded(lossless=False),
    "animated": encoded(save_all=True, append_images=[PICTURE.rotate(90)]),
    "with metadata": encoded(exif=orientation_entry("<", 1), icc_profile=b"x" * 3_001, xmp=b"<x/>"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_pixels_are_those_of_the_file_on_white(name):
    with Image.open(io.BytesIO(FILES[name])) as image:
        rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, "white")
    ground.alpha_composite(rgba)
    assert np.array_equal(decode_image(FILES[name]), ground.convert("RGB"))


@pytest.mark.parametrize("value", ORIENTED)
def test_every_orientation_is_applied(value):
    for found in (
        chunk(b"EXIF", orientation_entry("<", value)),
        chunk(b"EXIF", b"Exif\0\0" + orientation_entry(">", value)),
        chunk(b"XMP ", b'<x tiff:Orientation="%d"/>' % value),
    ):
        assert np.array_equal(decode_image(extended(SIMPLE, found)), ORIENTED[value](PLAIN))


@pytest.mark.parametrize(
    "metadata",
    [chunk(b"EXIF", b"garbage"), chunk(b"ICCP", b"\0"), chunk(b"XMP ", b"\xff" * 9), chunk(b"QQQQ", b"x"),
     chunk(b"EXIF", b"x" * 1_000)[:-500], b"\0\1\2"],
)  # fmt: skip
def test_nothing_is_refused_for_what_is_thrown_away(metadata):
    assert np.array_equal(decode_image(extended(SIMPLE, metadata)), PLAIN)
    assert np.array_equal(decode_image(SIMPLE + metadata), PLAIN)


def test_damage_to_the_picture_is_refused():
    for data in (
        SIMPLE[:-4], SIMPLE[:16], riff(), riff(chunk(b"EXIF", b"x")), riff(chunk(b"VP8L", b"x")),
        riff(chunk(b"VP8 ", b"x" * 20)), extended(SIMPLE, b"")[:60], FILES["animated"][:70],
        # A canvas of another size than the picture on it.
        extended(SIMPLE, b"", size=(31, 20)),
    ):  # fmt: skip
        with pytest.raises(CorruptImage):
            decode_image(data)


def test_a_canvas_beyond_the_limit_takes_no_memory():
    tracemalloc.start()
    with pytest.raises(ImageTooLarge):
        decode_image(extended(SIMPLE, b"", size=(16_383, 16_383)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_chunks_are_counted_before_the_picture_and_passed_over_behind_it():
    limits, many = ImageLimits(max_parts=100), chunk(b"QQQQ", b"") * 101
    with pytest.raises(ImageTooCostly):
        decode_image(extended(SIMPLE, many, b""), limits)
    assert np.array_equal(decode_image(extended(SIMPLE, many), limits), PLAIN)
    frames = encoded(save_all=True, append_images=[PICTURE.rotate(i) for i in range(1, 130)])
    assert np.array_equal(decode_image(frames, limits), decode_image(FILES["animated"]))


def test_the_largest_is_within_the_default_cost():
    data = extended(SIMPLE, b"", size=(8_000, 5_000))
    with pytest.raises(CorruptImage):
        decode_image(data)
