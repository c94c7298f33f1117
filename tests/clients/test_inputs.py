"""What may be given as an image or a text, and what is sent for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from monofacet import InputError, _inputs
from monofacet._base import SMALL_BYTES, is_small
from monofacet._inputs import MAX_IMAGE_BYTES, image_bytes, split, to_input, to_inputs
from monofacet.v1 import common_pb2

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def decode(data: bytes) -> np.ndarray:
    return np.array(PIL.Image.open(io.BytesIO(data)))


def test_a_path_is_sent_as_it_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(b"whatever is in it")
    assert image_bytes(path) == b"whatever is in it"


def test_bytes_are_sent_as_they_are() -> None:
    assert image_bytes(b"\x89PNG...") == b"\x89PNG..."
    assert image_bytes(memoryview(b"\x89PNG...")) == b"\x89PNG..."


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_pixels_arrive_without_loss(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(
        decode(image_bytes(pixels)), pixels.reshape(shape[:2]) if shape[-1] == 1 else pixels
    )


def test_pixels_need_not_be_contiguous() -> None:
    assert np.array_equal(decode(image_bytes(PIXELS[:, ::-1])), PIXELS[:, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "HSV", "YCbCr"])
def test_a_pil_image_of_any_mode_is_sent_as_png(mode: str) -> None:
    assert image_bytes(PIL.Image.new(mode, (5, 5))).startswith(b"\x89PNG")


def test_a_palette_image_keeps_its_transparency() -> None:
    image = PIL.Image.new("P", (2, 2))
    image.info["transparency"] = 0
    assert decode(image_bytes(image)).shape[2] == 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3, 4, 6), dtype=np.uint8), r"\[2, 3, 4, 6\]"),
        (np.zeros((0, 5, 3), dtype=np.uint8), r"\[0, 5, 3\]"),
        (np.zeros((5, 5, 2), dtype=np.uint8), r"\[5, 5, 2\]"),
        (b"", "empty"),
        (3, "int is no image"),
        ("a.png", "str is no image"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_bytes(value)  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read .*gone.png: No such file"):
        image_bytes(tmp_path / "gone.png")


def test_a_file_past_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "film.png"
    with path.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(InputError, match="at most"):
        image_bytes(path)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x" * 2000, "the image has 2,000 bytes; at most 1,000"),
        (bytearray(2000), "the image has 2,000 bytes"),
        (memoryview(b"x" * 2000), "the image has 2,000 bytes"),
        ("x" * 2000, "the text has"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_input_past_the_limit_is_sent(
    value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_input(value)  # type: ignore[arg-type]
    monkeypatch.setattr(_inputs, "MAX_IMAGE_BYTES", 1000)
    with pytest.raises(InputError, match=message):
        to_input(value)  # type: ignore[arg-type]


def truncated() -> PIL.Image.Image:
    file = io.BytesIO()
    PIL.Image.fromarray(NOISE).save(file, "TIFF")
    # Pillow decodes it when its pixels are asked for; no server reads the file itself.
    return PIL.Image.open(io.BytesIO(file.getvalue()[:1000]))


def closed() -> PIL.Image.Image:
    image = PIL.Image.new("RGB", (5, 5))
    image.close()
    return image


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, "truncated"),
        (lambda: PIL.Image.new("RGB", (0, 0)), "empty"),
        (lambda: PIL.Image.new("P", (0, 5)), "empty"),
        (closed, "closed"),
    ],
)
def test_an_image_that_pillow_cannot_read_is_refused_with_its_reason(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        image_bytes(make())  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png"])
def test_a_path_that_no_file_can_have_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="cannot be sent"):
        image_bytes(Path(path))


def test_a_text_that_is_no_unicode_is_refused_in_its_place() -> None:
    with pytest.raises(InputError, match=r"inputs\[1\]: the text cannot be sent: .*surrogates"):
        to_inputs(["a", "\ud800"])


def test_a_string_is_always_a_text() -> None:
    assert to_inputs(["heart.png"])[0].text == "heart.png"


@pytest.mark.parametrize("single", ["a heart", Path("."), b"\x89PNG", PIL.Image.new("L", (1, 1)), PIXELS])
def test_one_input_alone_is_a_batch_of_one(single: object) -> None:
    if isinstance(single, Path):
        with pytest.raises(InputError, match=r"inputs\[0\]: cannot read"):
            to_inputs(single)
    else:
        assert len(to_inputs(single)) == 1  # type: ignore[arg-type]


def test_the_bad_input_is_named_by_its_place() -> None:
    with pytest.raises(InputError, match=r"inputs\[1\]: the image is empty"):
        to_inputs(["a", b""])


def test_no_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to encode"):
        to_inputs([])


def texts(*sizes: int) -> list[common_pb2.Input]:
    return [common_pb2.Input(text="x" * size) for size in sizes]


def test_a_batch_is_split_by_count_and_keeps_its_order() -> None:
    batch = texts(*range(1, 11))
    parts = split(batch, max_inputs=4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert [item for part in parts for item in part] == batch


def test_a_batch_is_split_by_bytes_and_each_part_fits() -> None:
    parts = split(texts(*[3000] * 10), max_bytes=10_000 + 4096)
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    assert all(sum(item.ByteSize() for item in part) <= 10_000 for part in parts)


def test_what_a_request_carries_besides_its_inputs_counts_too() -> None:
    assert is_small(texts(10), reserved_bytes=SMALL_BYTES // 2)
    assert not is_small(texts(10), reserved_bytes=SMALL_BYTES)


def test_an_input_too_large_for_any_request_gets_one_of_its_own() -> None:
    assert [len(part) for part in split(texts(10, 50_000, 10), max_bytes=10_000)] == [1, 1, 1]
