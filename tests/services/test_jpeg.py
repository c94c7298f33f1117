"""JPEG files of every kind, against what the specification says they show, and the bounds on what they may cost."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from services.encoding.images import ImageLimits, decode_image, decode_picture, open_image
from services.errors import CorruptImage, ImageTooCostly
from tests.services.test_png import orientation_entry
from tests.support.jpeg_file import JFIF, adobe, flat_jpeg, scans_jpeg, segment

SAMPLINGS = {
    "4:4:4": [(1, 1)] * 3,
    "4:2:2": [(2, 1), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
}


def units_of(count: int, rows: int = 4, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(60, 200, (rows, columns, count))


def to_rgb(ycc: np.ndarray) -> np.ndarray:
    """BT.601 in full range, as JFIF has it."""
    y, cb, cr = ycc[..., 0].astype(float), ycc[..., 1] - 128.0, ycc[..., 2] - 128.0
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)


def centres(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The pixel in the middle of each unit, where no neighbour's colour is blended in."""
    image = np.asarray(decode_image(data)).astype(float)
    down, across = image.shape[0] // shape[0], image.shape[1] // shape[1]
    return image[down // 2 :: down, across // 2 :: across][: shape[0], : shape[1]]


@pytest.mark.parametrize("restart", [0, 1, 2, 5])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_sampling_shows_its_colours(sampling, restart):
    units = units_of(3)
    data = flat_jpeg(units, SAMPLINGS[sampling], restart=restart)
    # The inverse transform and the colours are each rounded to whole levels.
    np.testing.assert_allclose(centres(data, units.shape), to_rgb(units), atol=2)


@pytest.mark.parametrize(
    ("head", "names", "stored"),
    [
        (JFIF, (1, 2, 3), "ycc"), (adobe(1), (1, 2, 3), "ycc"), (b"", (1, 2, 3), "ycc"), (b"", (0, 1, 2), "ycc"),
        (adobe(0), (1, 2, 3), "rgb"), (b"", (82, 71, 66), "rgb"), (JFIF + adobe(0), (1, 2, 3), "ycc"),
        # What else is in the segments that say so may be damaged.
        (segment(0xE0, b"JFIF\0") + adobe(0), (1, 2, 3), "ycc"), (segment(0xEE, b"Adobe\0"), (1, 2, 3), "ycc"),
    ],
)  # fmt: skip
def test_colours_are_stored_as_the_markers_say(head, names, stored):
    units = units_of(3)
    expected = to_rgb(units) if stored == "ycc" else units
    decoded = centres(flat_jpeg(units, [(1, 1)] * 3, head=head, names=names), units.shape)
    np.testing.assert_allclose(decoded, expected, atol=2)


def test_grey_and_four_inks():
    grey = units_of(1)
    np.testing.assert_allclose(centres(flat_jpeg(grey, [(1, 1)]), grey.shape), grey.repeat(3, -1), atol=1)
    inks = units_of(4)
    # Adobe stores inks inverted: what is left of the light.
    light = inks[..., :3] * inks[..., 3:] / 255
    np.testing.assert_allclose(
        centres(flat_jpeg(inks, [(1, 1)] * 4, head=adobe(0)), inks.shape), light, atol=2
    )
    ycck = np.concatenate([to_rgb(inks[..., :3]), inks[..., 3:]], -1)
    light = (255 - ycck[..., :3]) * ycck[..., 3:] / 255
    np.testing.assert_allclose(
        centres(flat_jpeg(inks, [(1, 1)] * 4, head=adobe(2)), inks.shape), light, atol=3
    )


@pytest.mark.parametrize("size", [(17, 9), (31, 33), (8, 5), (16, 16)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_odd_sizes(sampling, size):
    across, down = SAMPLINGS[sampling][0]
    rows, columns = -(-size[1] // (8 * down)), -(-size[0] // (8 * across))
    units = np.broadcast_to([150, 100, 160], (rows, columns, 3))
    decoded = np.asarray(decode_image(flat_jpeg(units, SAMPLINGS[sampling], size=size)))
    assert decoded.shape == (size[1], size[0], 3)
    np.testing.assert_allclose(decoded, np.broadcast_to(to_rgb(units[:1, :1]), decoded.shape), atol=2)


SMOOTH = np.stack(np.meshgrid(np.arange(48) * 5, np.arange(40) * 6), -1).sum(-1) // 2
PICTURE = Image.fromarray(np.stack([SMOOTH, 255 - SMOOTH, SMOOTH // 2 + 50], -1).astype(np.uint8))


def encoded(image: Image.Image = PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, "subsampling": 0, **options})
    return buffer.getvalue()


# What cameras, scanners and programs write.
VARIANTS = {
    "baseline": encoded(),
    "progressive": encoded(progressive=True),
    "restarts in rows": encoded(restart_marker_rows=1),
    "restarts in blocks": encoded(restart_marker_blocks=3),
    "progressive with restarts": encoded(progressive=True, restart_marker_blocks=3),
    "optimised": encoded(optimize=True),
    "halved colours": encoded(subsampling=2),
    "grey": encoded(PICTURE.convert("L")),
    "progressive grey": encoded(PICTURE.convert("L"), progressive=True),
    "four inks": encoded(PICTURE.convert("CMYK")),
    "progressive four inks": encoded(PICTURE.convert("CMYK"), progressive=True),
    "flat blocks with restarts": flat_jpeg(units_of(3), [(2, 2), (1, 1), (1, 1)], restart=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_read_of_a_file_are_pillows_own_pixels(name):
    with Image.open(io.BytesIO(VARIANTS[name])) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_image(VARIANTS[name]), expected)
    if "flat" not in name:
        shown = PICTURE.convert("L").convert("RGB") if "grey" in name else PICTURE
        # Halved colours at a corner; all else is closer.
        assert np.abs(expected.astype(int) - np.asarray(shown)).mean() < 4


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_without_its_end_marker_is_read_when_every_pixel_is_there(name):
    data = VARIANTS[name]
    whole = np.asarray(decode_image(data))
    assert np.array_equal(decode_image(data[:-2]), whole)
    assert np.array_equal(decode_image(data[:-1]), whole)
    refused = 0
    for cut in range(3, min(400, len(data) // 2)):
        try:
            # The last bits of the last byte only fill it up.
            assert np.array_equal(decode_image(data[:-cut]), whole)
        except CorruptImage:
            refused += 1
    assert refused >= min(400, len(data) // 2) - 3 - 2


ORIENTED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("value", ORIENTED)
def test_every_orientation_is_applied_however_it_is_written(value):
    plain = np.asarray(decode_image(VARIANTS["baseline"]))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>%d</tiff:Orientation>" % value
    for head in (
        *(segment(0xE1, b"Exif\0\0" + orientation_entry(order, value)) for order in "<>"),
        segment(0xE1, xmp),
        segment(0xE1, b"Exif\0\0garbage") + segment(0xE1, xmp),
    ):
        data = VARIANTS["baseline"]
        assert np.array_equal(decode_image(data[:2] + head + data[2:]), ORIENTED[value](plain))


@pytest.mark.parametrize(
    "exif",
    [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", orientation_entry("<", 9),
     orientation_entry("<", 0), orientation_entry(">", 6)[:20], b"MM\0*" + b"\0" * 60],
)  # fmt: skip
def test_damaged_exif_leaves_the_picture_as_stored(exif):
    data = VARIANTS["baseline"]
    damaged = data[:2] + segment(0xE1, b"Exif\0\0" + exif) + data[2:]
    assert np.array_equal(decode_image(damaged), decode_image(data))


METADATA = {
    "a thumbnail": segment(0xE1, b"Exif\0\0" + VARIANTS["baseline"][:60_000]),
    "a comment": segment(0xFE, b"\xff\xda\xff\xd9"),
    "a profile in pieces": segment(0xE2, b"ICC_PROFILE\0\1\2" + b"\0" * 100),
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "Photoshop's": segment(0xED, b"Photoshop 3.0\x008BIM"),
    "a multi-picture index": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "bytes that are no marker": b"\0\1\2\xff\0",
    "bytes that fill up": b"\xff" * 1_000,
}


@pytest.mark.parametrize("name", METADATA)
def test_nothing_is_refused_for_what_is_thrown_away(name):
    data = VARIANTS["progressive"]
    scan = data.index(b"\xff\xda")
    plain = decode_image(data)
    # Behind the JFIF segment, before the first scan, and behind it all.
    assert np.array_equal(decode_image(data[:20] + METADATA[name] + data[20:]), plain)
    assert np.array_equal(decode_image(data[:scan] + METADATA[name] + data[scan:]), plain)
    assert np.array_equal(decode_image(data + METADATA[name] * 3), plain)


@pytest.mark.parametrize("part", [b"\xff\xdb", b"\xff\xc4", b"\xff\xc0", b"\xff\xda"])
def test_damage_to_the_picture_is_refused(part):
    data = VARIANTS["baseline"]
    place = data.index(part)
    with pytest.raises(CorruptImage):
        decode_image(data[:place] + data[place : place + 2] + b"\0\3\xff" + data[place + 5 :])
    with pytest.raises(CorruptImage):
        decode_image(data[: place + 3])


def test_two_frames_or_a_scan_of_nothing_are_refused():
    data = VARIANTS["baseline"]
    place = data.index(b"\xff\xc0")
    frame = data[place : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
    with pytest.raises(CorruptImage, match="two frames"):
        decode_image(data[:place] + frame + data[place:])
    scan = data.index(b"\xff\xda")
    with pytest.raises(CorruptImage, match="component"):
        decode_image(data[: scan + 5] + b"\x63" + data[scan + 6 :])


def test_scans_are_counted_before_anything_is_decoded(monkeypatch):
    data = scans_jpeg(400, 6_300, 6_300)
    assert len(data) < 150_000
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(ImageTooCostly, match="scans") as caught:
        decode_image(data)
    assert caught.value.reason == "IMAGE_TOO_COSTLY"


def test_many_scans_of_a_small_picture_and_few_of_the_largest_are_within_the_limit():
    assert decode_image(scans_jpeg(400, 64, 64)).size == (64, 64)
    assert open_image(scans_jpeg(10, 6_300, 6_300)).seconds < ImageLimits().max_decode_s
    # What libjpeg writes for three components: ten scans. For four: eighteen.
    for mode, scans in (("RGB", 10), ("CMYK", 18)):
        data = encoded(PICTURE.convert(mode), progressive=True)
        assert data.count(b"\xff\xda") == scans
        pixels = PICTURE.width * PICTURE.height
        assert open_image(data).seconds * 40_000_000 / pixels < ImageLimits().max_decode_s


def test_markers_are_counted():
    data, limits = VARIANTS["baseline"], ImageLimits(max_parts=1_000)
    with pytest.raises(ImageTooCostly, match="markers"):
        decode_image(data[:2] + segment(0xFE) * 1_000 + data[2:], limits)
    with pytest.raises(ImageTooCostly, match="markers"):
        decode_image(data[:2] + b"\xff\xd0" * 1_000 + data[2:], limits)
    # Restarts within the pixels are none of them.
    many = flat_jpeg(units_of(1, 40, 40), [(1, 1)], restart=1)
    assert decode_image(many, limits).size == (320, 320)


def test_decoding_ends_soon_when_it_is_told_to():
    class Enough(Exception):
        pass

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise Enough

    picture = open_image(scans_jpeg(30, 5_000, 5_000))
    with pytest.raises(Enough):
        decode_picture(picture, check)
    assert calls == 21


def test_a_frame_of_no_size_is_refused():
    data = bytearray(VARIANTS["baseline"])
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 0, 0)
    with pytest.raises(Exception, match="0 x 0 pixels"):
        decode_image(bytes(data))
