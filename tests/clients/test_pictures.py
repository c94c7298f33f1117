"""Whatever a program holds of a picture, the server sees the pixels of the file that it came from."""

from __future__ import annotations

import base64
import io
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from monofacet import InputError
from monofacet._inputs import image_bytes, to_inputs
from monofacet._pictures import ORIENTATION_TAG, encode

from services.encoding.images import decode_image

RNG = np.random.default_rng(0)
# No side and no part like another.
COLOURS = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)
COLOURS[:8, :8] = (255, 0, 0)
GREYS = COLOURS[..., 0]
DEEP = (np.arange(24 * 36).reshape(24, 36) * 75).astype(np.uint16)
RGB = PIL.Image.fromarray(COLOURS)
ALPHA = np.dstack([COLOURS, np.tile(np.linspace(0, 255, 36).astype(np.uint8), (24, 1))])


def seen(data: bytes) -> np.ndarray:
    """What a server makes of a file: uint8, shape [height, width, 3]."""
    return np.asarray(decode_image(data))


def saved(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def palette(transparent: bool) -> PIL.Image.Image:
    image = PIL.Image.fromarray(COLOURS).quantize(16)
    if transparent:
        image.info["transparency"] = 3
    return image


# Every mode that a file which a server reads can have.
FILES: dict[str, Callable[[], bytes]] = {
    "png 1": lambda: saved(PIL.Image.fromarray(GREYS).convert("1")),
    "png L": lambda: saved(PIL.Image.fromarray(GREYS)),
    "png L with transparency": lambda: saved(PIL.Image.fromarray(GREYS), transparency=int(GREYS[20, 20])),
    "png LA": lambda: saved(PIL.Image.fromarray(ALPHA).convert("LA")),
    "png P": lambda: saved(palette(False)),
    "png P with transparency": lambda: saved(palette(True), transparency=3),
    "png RGB": lambda: saved(PIL.Image.fromarray(COLOURS)),
    "png RGB with transparency": lambda: saved(PIL.Image.fromarray(COLOURS), transparency=(255, 0, 0)),
    "png RGBA": lambda: saved(PIL.Image.fromarray(ALPHA)),
    "png I;16": lambda: saved(PIL.Image.fromarray(DEEP)),
    "jpeg L": lambda: saved(PIL.Image.fromarray(GREYS), "JPEG"),
    "jpeg RGB": lambda: saved(PIL.Image.fromarray(COLOURS), "JPEG"),
    "jpeg CMYK": lambda: saved(PIL.Image.fromarray(COLOURS).convert("CMYK"), "JPEG"),
    "jpeg progressive": lambda: saved(PIL.Image.fromarray(COLOURS), "JPEG", progressive=True),
    "webp RGB": lambda: saved(PIL.Image.fromarray(COLOURS), "WEBP"),
    "webp RGBA": lambda: saved(PIL.Image.fromarray(ALPHA), "WEBP", lossless=True),
    "webp animated": lambda: saved(
        PIL.Image.fromarray(COLOURS), "WEBP", save_all=True, append_images=[PIL.Image.new("RGB", (36, 24))],
        lossless=True,
    ),
}  # fmt: skip


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


def loaded(data: bytes) -> PIL.Image.Image:
    image = opened(data)
    image.load()
    return image


# A program's ways with a picture that change nothing in it.
WAYS: dict[str, Callable[[bytes], PIL.Image.Image]] = {
    "opened": opened,
    "loaded": loaded,
    "copied": lambda data: opened(data).copy(),
    "upright": lambda data: PIL.ImageOps.exif_transpose(opened(data)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_an_opened_picture_is_seen_as_its_file(name: str, way: str) -> None:
    data = FILES[name]()
    assert np.array_equal(seen(image_bytes(WAYS[way](data))), seen(data))


@pytest.mark.parametrize("way", [*WAYS, "converted"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_opened_picture_is_upright_as_its_file(kind: str, orientation: int, way: str) -> None:
    data = saved(PIL.Image.fromarray(COLOURS), kind, exif=turned(orientation), quality=100)
    ways = {**WAYS, "converted": lambda data: opened(data).convert("RGB")}
    assert np.array_equal(seen(image_bytes(ways[way](data))), seen(data))


@pytest.mark.parametrize("mode", ["I;16", "L", "LA", "P", "RGBA"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_picture_of_any_mode_is_turned(mode: str, orientation: int) -> None:
    image = PIL.Image.fromarray(DEEP) if mode == "I;16" else PIL.Image.fromarray(ALPHA).convert(mode)
    data = saved(image, exif=turned(orientation))
    assert np.array_equal(seen(image_bytes(loaded(data))), seen(data))


def test_a_damaged_exif_turns_nothing() -> None:
    image = PIL.Image.fromarray(COLOURS)
    image.info["exif"] = b"Exif\0\0broken"
    assert np.array_equal(seen(image_bytes(image)), COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_file_itself_is_sent_until_the_picture_is_touched(kind: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "picture"
    data = saved(PIL.Image.fromarray(COLOURS), kind)
    path.write_bytes(data)
    with PIL.Image.open(path) as image:
        assert image_bytes(image) == data
        # It can still be read afterwards.
        assert image.resize((4, 4)).size == (4, 4)
        assert image_bytes(image) != data


def test_an_image_file_that_was_opened_at_another_place_is_read_from_its_start() -> None:
    data = saved(PIL.Image.fromarray(COLOURS), "JPEG")
    file = io.BytesIO(data)
    file.seek(100)
    assert image_bytes(PIL.Image.open(file)) == data


def changed_in_place() -> Iterator[tuple[str, PIL.Image.Image]]:
    data = saved(RGB.resize((360, 240)), "JPEG")
    image = opened(data)
    image.paste((0, 0, 255), (0, 0, 360, 240))
    yield "paste", image
    image = opened(data)
    image.thumbnail((90, 60))
    yield "thumbnail", image
    image = opened(data)
    image.draft("RGB", (90, 60))
    yield "draft", image
    image = opened(data)
    image.putpixel((0, 0), (1, 2, 3))
    yield "putpixel", image
    image = opened(FILES["webp animated"]())
    image.seek(1)
    yield "seek", image


def test_what_was_changed_is_sent_as_it_is_now() -> None:
    for how, image in changed_in_place():
        data = image_bytes(image)
        assert np.array_equal(seen(data), np.asarray(image.convert("RGB"))), how


def test_a_phone_picture_of_several_frames_is_seen_as_its_file() -> None:
    frames = [PIL.Image.fromarray(COLOURS), PIL.Image.new("RGB", (36, 24))]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert opened(data).format == "MPO"
    assert image_bytes(opened(data)) == data
    assert np.array_equal(seen(image_bytes(loaded(data))), seen(data))


def grey_of(levels: Any) -> np.ndarray:
    return np.repeat(np.asarray(levels, dtype=np.uint8)[..., None], 3, axis=2)


def raw(mode: str, array: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.frombytes(mode, array.shape[::-1], array.tobytes())


# Pictures of all of Pillow's modes, and what they show.
MODES: dict[str, tuple[PIL.Image.Image, Any]] = {
    "1": (PIL.Image.fromarray(GREYS).convert("1"), PIL.Image.fromarray(GREYS).convert("1").convert("RGB")),
    "L": (PIL.Image.fromarray(GREYS), grey_of(GREYS)),
    "RGBX": (RGB.convert("RGBX"), RGB),
    "CMYK": (RGB.convert("CMYK"), RGB.convert("CMYK").convert("RGB")),
    "YCbCr": (RGB.convert("YCbCr"), RGB.convert("YCbCr").convert("RGB")),
    "HSV": (RGB.convert("HSV"), RGB.convert("HSV").convert("RGB")),
    "LAB": (PIL.Image.new("LAB", (8, 8), (255, 128, 128)), PIL.Image.new("RGB", (8, 8), "white")),
    "PA": (PIL.Image.new("PA", (8, 8)), PIL.Image.new("RGB", (8, 8), "white")),
    "RGBa": (PIL.Image.new("RGBa", (8, 8), (0, 0, 0, 0)), PIL.Image.new("RGB", (8, 8), "white")),
    "La": (PIL.Image.new("LA", (8, 8), (0, 0)).convert("La"), PIL.Image.new("RGB", (8, 8), "white")),
    "I;16": (raw("I;16", DEEP), grey_of(DEEP >> 8)),
    "I;16L": (raw("I;16L", DEEP), grey_of(DEEP >> 8)),
    "I;16B": (raw("I;16B", DEEP.astype(">u2")), grey_of(DEEP >> 8)),
    "I of 16 bits": (PIL.Image.fromarray(DEEP.astype(np.int32)), grey_of(DEEP >> 8)),
    "I of 8 bits": (PIL.Image.fromarray(GREYS).convert("I"), grey_of(GREYS)),
    "F in [0, 1]": (PIL.Image.fromarray(GREYS.astype(np.float32) / 255), grey_of(GREYS)),
    "F in [0, 255]": (PIL.Image.fromarray(GREYS).convert("F"), grey_of(GREYS)),
    "F of 16 bits": (PIL.Image.fromarray(DEEP.astype(np.float32)), grey_of(DEEP >> 8)),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_seen_as_it_looks(mode: str) -> None:
    image, looks = MODES[mode]
    # Lab colours are rounded once more.
    assert np.abs(seen(image_bytes(image)).astype(int) - np.asarray(looks)).max() <= (mode == "LAB")


@pytest.mark.parametrize("numbers", [-1.0, 70_000.0, float("nan"), float("inf")])
def test_numbers_that_are_no_levels_are_refused(numbers: float) -> None:
    with pytest.raises(InputError, match="no picture"):
        image_bytes(PIL.Image.new("F", (8, 8), numbers))


class Tensor:
    """Behaves as a tensor of torch that needs a gradient and lies on a GPU, of a type that numpy does not know."""

    def __init__(self, array: np.ndarray, dtype: str = "torch.float32", ready: bool = False) -> None:
        self.array, self.dtype, self.ready = array, dtype, ready

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return Tensor(self.array, self.dtype, True)

    def float(self) -> Tensor:
        return Tensor(self.array, "torch.float32", self.ready)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if not self.ready or self.dtype == "torch.bfloat16":
            raise TypeError("can't convert")
        return self.array


FLOATS = COLOURS / 255
# The same picture in all the ways that packages have.
ARRAYS: dict[str, Any] = {
    **{name: COLOURS.astype(name) for name in ("uint8", "int16", "int32", "int64", "uint32", "uint64")},
    **{name: FLOATS.astype(name) for name in ("float16", "float32", "float64", "longdouble", ">f4")},
    "uint16": COLOURS.astype(np.uint16) * 257,
    ">u2": (COLOURS.astype(np.uint16) * 257).astype(">u2"),
    "channels first": COLOURS.transpose(2, 0, 1),
    "floats, channels first": FLOATS.transpose(2, 0, 1),
    "overshooting": FLOATS + np.where(COLOURS == 255, 9e-4, 0),
    "mirrored twice": COLOURS[:, ::-1][:, ::-1],
    "fortran": np.asfortranarray(COLOURS),
    "read-only": np.frombuffer(COLOURS.tobytes(), np.uint8).reshape(COLOURS.shape),
    "opaque": np.dstack([COLOURS, np.full(COLOURS.shape[:2], 255, np.uint8)]),
    "tensor": Tensor(COLOURS.transpose(2, 0, 1)),
    "tensor of floats": Tensor(FLOATS.transpose(2, 0, 1)),
    "tensor of bfloat16": Tensor(FLOATS.transpose(2, 0, 1), "torch.bfloat16"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_pixels_of_any_type_and_order_are_seen_as_the_picture(name: str) -> None:
    (item,) = to_inputs(ARRAYS[name])
    assert np.array_equal(seen(item.image.data), COLOURS)


GREY_ARRAYS: dict[str, tuple[Any, Any]] = {
    "uint8": (GREYS, GREYS),
    "one channel": (GREYS[..., None], GREYS),
    "one channel, first": (GREYS[None], GREYS),
    "uint16": (DEEP, DEEP >> 8),
    "float64": (GREYS / 255, GREYS),
    "bool": (GREYS > 99, np.where(GREYS > 99, 255, 0)),
}


@pytest.mark.parametrize("name", GREY_ARRAYS)
def test_greys_of_any_type_are_seen_as_the_picture(name: str) -> None:
    array, levels = GREY_ARRAYS[name]
    assert np.array_equal(seen(image_bytes(array)), grey_of(levels))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 9, 4), (4, 9)), ((4, 9, 3), (9, 4)), ((4, 9, 4), (9, 4)), ((1, 5, 4), (4, 5)), ((5, 4, 1), (4, 5))],
)
def test_a_shape_that_can_be_read_in_two_ways_is_read_as_a_picture_that_can_be(
    shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    assert opened(image_bytes(np.zeros(shape, np.uint8))).size == size


def test_tensors_of_torch_are_taken_and_the_client_does_not_import_it() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(COLOURS.transpose(2, 0, 1).copy())
    for value in (tensor, tensor.float() / 255, (tensor.float() / 255).requires_grad_(), tensor[:, :, :]):
        (item,) = to_inputs(value)
        assert np.array_equal(seen(item.image.data), COLOURS)
    # 8 bits of mantissa.
    (item,) = to_inputs(tensor.float().div(255).bfloat16())
    assert np.abs(seen(item.image.data).astype(int) - COLOURS).max() <= 1
    assert len(to_inputs(torch.stack([tensor] * 3))) == 3
    with pytest.raises(InputError, match="gives no array"):
        to_inputs(torch.empty(3, 9, 9, device="meta"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (FLOATS * 2 - 1, r"from -1 to 1 .* floats lie in \[0, 1\]"),
        (FLOATS * 255, r"from 0 to 255 .* floats lie in \[0, 1\]"),
        (FLOATS * np.nan, "floats lie in"),
        (COLOURS.astype(np.int32) * 2, r"integers lie in \[0, 255\]"),
        (COLOURS.astype(np.int16) - 1, r"integers lie in \[0, 255\]"),
        (FLOATS + 0j, "an array of complex128 is no image"),
        (np.array(3), r"shape \[\]"),
        (np.zeros((5, 5, 2)), r"shape \[5, 5, 2\]"),
        (np.zeros((3, 0, 5)), r"shape \[3, 0, 5\]"),
        (np.zeros(7), r"shape \[7\]"),
    ],
)
def test_an_array_that_is_no_picture_is_refused_with_what_one_is(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_inputs(array)


def test_an_array_with_four_axes_is_a_batch_of_pictures() -> None:
    first, second = to_inputs(np.stack([COLOURS, 255 - COLOURS]))
    assert np.array_equal(seen(first.image.data), COLOURS)
    assert np.array_equal(seen(second.image.data), 255 - COLOURS)


class Series:
    """Texts as pandas has them."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(["a", "b"], object)


@pytest.mark.parametrize(
    "values",
    [np.array(["a", "b"]), np.array(["a", "b"], object), Series(), ["a", np.str_("b")], iter(["a", "b"])],
    ids=["str", "object", "series", "list", "iterator"],
)
def test_an_array_of_strings_is_a_batch_of_texts(values: Any) -> None:
    assert [item.text for item in to_inputs(values)] == ["a", "b"]
    assert to_inputs(np.array("a"))[0].text == "a"


def test_an_array_of_objects_is_a_batch_of_whatever_they_are() -> None:
    values = np.array(["a", RGB, b"\x89PNG"], object)
    assert [item.WhichOneof("input") for item in to_inputs(values)] == ["text", "image", "image"]


FILE = saved(RGB)
BASE64 = base64.b64encode(FILE).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/png;BASE64,{BASE64}",
        f"data:image/x;charset=utf-8;base64,{BASE64.rstrip('=')}",
        f" data:image/png;base64,\n{BASE64[:76]}\n{BASE64[76:]}\n",
        f"data:image/png;base64,{urllib.parse.quote(BASE64, safe='')}",
        f"data:image/png,{urllib.parse.quote_from_bytes(FILE)}",
    ],
)
def test_a_data_uri_is_the_image_that_it_holds(uri: str) -> None:
    assert to_inputs(uri)[0].image.data == FILE
    assert image_bytes(uri) == FILE


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64,%%%", "the data URI cannot be read"),
        ("data:image/png;base64,AAAAA", "the data URI cannot be read"),
        ("data:image/png;base64,", "the image is empty"),
    ],
)
def test_a_data_uri_that_holds_no_image_is_refused(uri: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_inputs(uri)


@pytest.mark.parametrize(
    "text", ["data:text/plain,hello", "a data:image/png;base64,AAAA", "data:image", "data: image"]
)
def test_other_strings_are_texts(text: str) -> None:
    assert to_inputs(text)[0].text == text


def photo(width: int, height: int) -> PIL.Image.Image:
    """Smooth and noisy as a photo is."""
    small = np.random.default_rng(1).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_a_photo_that_is_too_large_as_png_is_sent_all_the_same(mode: str) -> None:
    image = photo(800, 600)
    if mode == "RGBA":
        image.putalpha(128)
    if mode == "I;16":
        image = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    exact = encode(image, 10**9)
    limit = len(exact) // 2
    data = encode(image, limit)
    assert data.startswith(b"\xff\xd8")
    assert len(data) <= limit
    # The towers see 224 pixels or so: what JPEG changed has gone by then.
    towers = [
        np.asarray(decode_image(file).resize((224, 224), PIL.Image.Resampling.BICUBIC))
        for file in (exact, data)
    ]
    assert np.abs(towers[0].astype(int) - towers[1]).mean() < 1


def test_a_picture_of_any_size_can_be_sent() -> None:
    noise = PIL.Image.effect_noise((512, 512), 100)
    data = encode(noise, 20_000)
    assert len(data) <= 20_000
    assert opened(data).size == (128, 128)


def test_an_opened_file_past_the_limit_is_made_smaller() -> None:
    data = saved(photo(400, 300), "JPEG", quality=100, subsampling=0)
    assert len(encode(opened(data), len(data) // 2)) <= len(data) // 2
