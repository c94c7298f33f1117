"""PNG files of every kind, against what the specification says their pixels are."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from services.encoding.images import ImageLimits, decode_image
from services.errors import CorruptImage, ImageTooCostly
from tests.support.png_file import (
    CHANNELS,
    GREY,
    GREY_ALPHA,
    KINDS,
    PALETTE,
    RGB,
    RGB_ALPHA,
    SIGNATURE,
    chunk,
    header,
    pixels,
    png,
)

SIZES = [(4, 4), (5, 7), (9, 4), (13, 10), (33, 32)]
# What may stand around the pixels and changes none of them.
AROUND = b"".join(
    [
        chunk(b"gAMA", struct.pack(">I", 45_455)),
        chunk(b"cHRM", struct.pack(">8I", 31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)),
        chunk(b"sRGB", b"\0"),
        chunk(b"bKGD", struct.pack(">3H", 0, 1, 0)),
        chunk(b"pHYs", struct.pack(">IIB", 1, 4, 0)),
        chunk(b"tEXt", b"Comment\0hello"),
    ]
)


def random_values(size: tuple[int, int], colour: int, depth: int) -> np.ndarray:
    rng = np.random.default_rng(size[0] * 100 + colour * 20 + depth)
    values = rng.integers(0, 1 << depth, (*size, CHANNELS[colour]))
    if depth == 16:
        # Colours that differ in their lower bytes alone, which 8 bits cannot tell apart.
        values[::2] = values[0, 0] // 256 * 256 + rng.integers(0, 3, values[::2].shape)
    return values


def palette_of(depth: int) -> np.ndarray:
    return np.random.default_rng(depth).integers(0, 256, (1 << depth, 3)).astype(np.uint8)


def shown(values: np.ndarray, colour: int, depth: int, transparency: np.ndarray | None) -> np.ndarray:
    """What a viewer shows on white, as 8-bit RGB before rounding."""
    if colour == PALETTE:
        rgb = palette_of(depth)[values[..., 0]].astype(float)
        alpha = np.full(values.shape[:2], 255.0)
        if transparency is not None:
            alpha = np.append(transparency, np.full(256, 255))[values[..., 0]].astype(float)
    else:
        eight = values >> 8 if depth == 16 else values * 255 // ((1 << depth) - 1)
        alpha = np.full(values.shape[:2], 255.0)
        if colour in (GREY_ALPHA, RGB_ALPHA):
            alpha, eight = eight[..., -1].astype(float), eight[..., :-1]
        elif transparency is not None:
            alpha = np.where((values == transparency).all(-1), 0.0, 255.0)
        rgb = np.broadcast_to(eight, (*eight.shape[:2], 3)).astype(float)
    return rgb * alpha[..., None] / 255 + 255 * (1 - alpha[..., None] / 255)


@pytest.mark.parametrize("see_through", [False, True], ids=["opaque", "tRNS"])
@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "adam7"])
@pytest.mark.parametrize(("colour", "depth"), KINDS)
def test_every_kind_shows_what_the_specification_says(colour, depth, interlaced, see_through):
    if see_through and colour in (GREY_ALPHA, RGB_ALPHA):
        pytest.skip("has no colour key beside its alpha")
    for number, size in enumerate(SIZES):
        values = random_values(size, colour, depth)
        palette = palette_of(depth).tobytes() if colour == PALETTE else b""
        transparency, packed = None, b""
        if see_through and colour == PALETTE:
            transparency = np.array([0, 255, 0, 255][: 1 << depth])
            packed = bytes(transparency.tolist())
        elif see_through:
            transparency = values[-1, -1]
            packed = transparency.astype(">u2").tobytes()
        filters = (0, 1, 2, 3, 4) if number % 2 else (4, 3, 2, 1, 0)
        options = {"palette": palette, "transparency": packed, "filters": filters, "pieces": number + 1}
        data = png(values, depth, colour, interlaced=interlaced, before=AROUND, after=AROUND, **options)
        expected = shown(values, colour, depth, transparency)
        decoded = np.asarray(decode_image(data))
        if colour in (GREY_ALPHA, RGB_ALPHA):
            # Half a level for the rounding of what is half transparent, and half for doing so in 8 bits.
            np.testing.assert_allclose(decoded, expected, atol=1.0)
        else:
            assert np.array_equal(decoded, np.round(expected))


def test_a_key_is_compared_in_the_files_own_depth():
    values = np.full((4, 4, 3), 0x1234)
    values[0, 0] = 0x1235
    decoded = np.asarray(decode_image(png(values, 16, RGB, transparency=struct.pack(">3H", *[0x1234] * 3))))
    assert decoded[0, 0].tolist() == [0x12] * 3
    assert (decoded.reshape(-1, 3)[1:] == 255).all()


def test_of_a_key_wider_than_the_depth_the_lower_bits_count():
    values = np.arange(16).reshape(4, 4, 1)
    decoded = np.asarray(decode_image(png(values, 4, GREY, transparency=struct.pack(">H", 0xF3))))
    assert decoded[0, :, 0].tolist() == [0, 17, 34, 255]


def test_an_index_beyond_the_palette_is_black():
    data = png(np.arange(16).reshape(4, 4, 1), 4, PALETTE, palette=b"\xff\x80\x40" * 3)
    assert np.asarray(decode_image(data))[0].tolist() == [[255, 128, 64]] * 3 + [[0, 0, 0]]


VALUES = np.random.default_rng(0).integers(0, 256, (12, 12, 3))
PLAIN = np.asarray(decode_image(png(VALUES, 8, RGB)))
BOMB = zlib.compress(bytes(50_000_000), 9)
ANCILLARY = {
    "compressed text of 50 MB": chunk(b"zTXt", b"parameters\0\0" + BOMB),
    "international text of 50 MB": chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB),
    "colour profile of 50 MB": chunk(b"iCCP", b"profile\0\0" + BOMB),
    "EXIF of 50 MB, as ImageMagick wrote it": chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "text of 2 MB": chunk(b"tEXt", b"parameters\0" + b"x" * 2_000_000),
    "text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", wrong_checksum=True),
    "gamma with a wrong checksum": chunk(b"gAMA", b"\0\0\0\1", wrong_checksum=True),
    "short pHYs": chunk(b"pHYs", b"\0\0"),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0\0\0"),
    "empty sRGB": chunk(b"sRGB"),
    "profile that is not compressed": chunk(b"iCCP", b"x\0\0notzlib"),
    "profile compressed in an unknown way": chunk(b"iCCP", b"x\0\7abc"),
    "text compressed in an unknown way": chunk(b"zTXt", b"x\0\7abc"),
    "text without a keyword": chunk(b"iTXt", b"\xff\xfe"),
    "EXIF that is none": chunk(b"eXIf", b"not a tiff"),
    "EXIF cut off": chunk(b"eXIf", b"II*\0\xff\xff\0\0"),
    "a key of the wrong length": chunk(b"tRNS", b"\0"),
    "a key with a wrong checksum": chunk(
        b"tRNS", struct.pack(">3H", *VALUES[0, 0].tolist()), wrong_checksum=True
    ),
    "animation control without an animation": chunk(b"acTL", b"\0"),
    "a chunk that nobody knows": chunk(b"qqQq", b"\0" * 100),
}


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("what", ANCILLARY)
def test_nothing_is_refused_for_what_is_thrown_away(what, side):
    data = png(VALUES, 8, RGB, **{side: ANCILLARY[what]})
    tracemalloc.start()
    decoded = np.asarray(decode_image(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(decoded, PLAIN)
    # Of EXIF in text 140 kB are unpacked, of all else nothing; the file itself is copied once or twice.
    assert peak < 2_000_000 + 3 * len(data)


IDAT = zlib.compress(pixels(VALUES, 8, False, (0,)))
HEAD = header(12, 12, 8, RGB)
CRITICAL = {
    "header with a wrong checksum": chunk(b"IHDR", HEAD[8:-4], wrong_checksum=True) + chunk(b"IDAT", IDAT),
    "short header": chunk(b"IHDR", HEAD[8:-5]) + chunk(b"IDAT", IDAT),
    "colour type that does not exist": header(12, 12, 8, 5) + chunk(b"IDAT", IDAT),
    "depth that does not exist": header(12, 12, 4, RGB) + chunk(b"IDAT", IDAT),
    "unknown interlacing": chunk(b"IHDR", HEAD[8:-5] + b"\2") + chunk(b"IDAT", IDAT),
    "no pixels": HEAD + chunk(b"IEND"),
    "pixels with a wrong checksum": HEAD + chunk(b"IDAT", IDAT, wrong_checksum=True) + chunk(b"IEND"),
    "pixels that are not compressed": HEAD + chunk(b"IDAT", b"notzlib") + chunk(b"IEND"),
    "half of the pixels": HEAD + chunk(b"IDAT", IDAT[: len(IDAT) // 2]) + chunk(b"IEND"),
    "pixels with something between": (
        HEAD
        + chunk(b"IDAT", IDAT[:99])
        + chunk(b"tEXt", b"a\0b")
        + chunk(b"IDAT", IDAT[99:])
        + chunk(b"IEND")
    ),
    "no palette": header(12, 12, 8, PALETTE) + chunk(b"IDAT", IDAT) + chunk(b"IEND"),
    "palette with a wrong checksum": (
        header(12, 12, 8, PALETTE) + chunk(b"PLTE", b"abc", wrong_checksum=True) + chunk(b"IDAT", IDAT)
    ),
    "palette of half colours": header(12, 12, 8, PALETTE) + chunk(b"PLTE", b"abcd") + chunk(b"IDAT", IDAT),
    "a critical chunk that nobody knows": HEAD + chunk(b"CgBI", b"\0\0\0\0") + chunk(b"IDAT", IDAT),
    "no header": chunk(b"IDAT", IDAT) + chunk(b"IEND"),
    "nothing": b"",
}


@pytest.mark.parametrize("what", CRITICAL)
def test_damage_to_the_picture_is_refused(what):
    with pytest.raises(CorruptImage):
        decode_image(SIGNATURE + CRITICAL[what])


@pytest.mark.parametrize("tail", [b"", b"\0" * 1_000, b"<html>", chunk(b"IDAT", b"more")])
def test_what_follows_the_pixels_does_not_matter(tail):
    data = SIGNATURE + HEAD + chunk(b"IDAT", IDAT) + tail
    assert np.array_equal(np.asarray(decode_image(data)), PLAIN)
    # Cut off in its checksum.
    assert np.array_equal(np.asarray(decode_image(SIGNATURE + HEAD + chunk(b"IDAT", IDAT)[:-2])), PLAIN)


def orientation_entry(order: str, value: int) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IHHHIHH", 8, 1, 0x0112, 3, 1, value, 0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_the_orientation_is_applied_wherever_it_stands(order, side):
    exif = orientation_entry(order, 6)
    profile = b"\nexif\n  40\n" + (b"Exif\0\0" + exif).hex().encode() + b"\n"
    for found in (
        chunk(b"eXIf", exif),
        chunk(b"eXIf", b"Exif\0\0" + exif),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    ):
        assert np.array_equal(decode_image(png(VALUES, 8, RGB, **{side: found})), np.rot90(PLAIN, -1))


def test_an_orientation_with_a_wrong_checksum_is_passed_over():
    damaged = chunk(b"eXIf", orientation_entry("<", 6), wrong_checksum=True)
    assert np.array_equal(decode_image(png(VALUES, 8, RGB, before=damaged)), PLAIN)


def test_chunks_are_counted_before_the_pixels_and_passed_over_behind_them():
    limits, many = ImageLimits(max_parts=1_000), chunk(b"teXt") * 1_001
    with pytest.raises(ImageTooCostly, match="chunks") as caught:
        decode_image(png(VALUES, 8, RGB, before=many), limits)
    assert caught.value.reason == "IMAGE_TOO_COSTLY"
    assert np.array_equal(decode_image(png(VALUES, 8, RGB, after=many), limits), PLAIN)
    assert np.array_equal(decode_image(png(VALUES, 8, RGB, pieces=400), limits), PLAIN)


def test_every_permitted_png_is_within_the_default_cost():
    # The dearest: 40 megapixels of 8 bytes, and those of 6 that are decoded twice.
    from services.encoding.formats import png as reader

    for colour, extra in ((RGB_ALPHA, b""), (RGB, chunk(b"tRNS", bytes(6)))):
        data = SIGNATURE + header(8_000, 5_000, 16, colour) + extra + chunk(b"IDAT", b"x")
        assert reader.read(data, 100).seconds < ImageLimits().max_decode_s
