"""Pictures: from what programs hold to files that servers read, and back.

A server decodes a file to 8-bit RGB, upright by its EXIF, on white. What is made here of a picture that was opened, or
of an array, decodes to the same pixels as the file that it came from.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

from monofacet import _exceptions as exceptions

# What Pillow raises for a picture that it cannot read or write, which has no base class of its own: ValueError for an
# over-long text chunk too.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)

# The contract's formats; Pillow knows many more, and not all of them are harmless to decode.
FORMATS = ("PNG", "JPEG", "WEBP")

ORIENTATION_TAG = 0x0112
WHITE = (255, 255, 255, 255)
# What a server takes; a shape that can be read in two ways is read as the one that leaves sides of this many pixels.
MIN_SIDE = 4
CHANNELS = (1, 3, 4)
# How far floats may lie outside of [0, 1]: what resampling overshoots by.
OVERSHOOT = 1e-3


def decode(data: bytes, what: str) -> PIL.Image.Image:
    """Decode a picture of an answer.

    Parameters
    ----------
    data
        A whole PNG, JPEG or WebP file.
    what
        Names it in the error.

    Returns
    -------
    PIL.Image.Image
        With its pixels loaded.

    Raises
    ------
    ResponseError
        If it cannot be decoded.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except PICTURE_ERRORS as error:
        raise exceptions.ResponseError(f"{what} cannot be decoded: {error}") from error
    return image


def encode(image: PIL.Image.Image, max_bytes: int) -> bytes:
    """Make a file of a PIL image.

    Parameters
    ----------
    image
        Of any mode. The file that it was opened from, if its pixels have not been read since: then it is sent as it
        is. Otherwise it is turned upright, as its EXIF says, and made a PNG without loss.
    max_bytes
        Of the file. A PNG that has more is made a JPEG on white, at quality 95 or 85, and of half the width and
        height if that is not enough.

    Returns
    -------
    bytes
        PNG, JPEG or WebP.

    Raises
    ------
    InputError
        If the picture cannot be read, or holds numbers that are no levels.
    """
    try:
        data = _own_file(image, max_bytes)
        if data is not None:
            return data
        picture = _plain(image)
        # Level 1 is several times faster than the default, for a few per cent of size.
        data = _saved(picture, "PNG", compress_level=1, icc_profile=None)
        return data if len(data) <= max_bytes else _within(picture, max_bytes)
    except exceptions.InputError:
        raise
    except PICTURE_ERRORS as error:
        # An opened file is decoded only now; an image may also be closed, or have no pixels.
        raise exceptions.InputError(f"the image cannot be read: {error}") from error


def _own_file(image: PIL.Image.Image, max_bytes: int) -> bytes | None:
    """Return the file that an image was opened from; None where it is not at hand, or the image may have changed."""
    if not isinstance(image, PIL.ImageFile.ImageFile) or image.format not in (*FORMATS, "MPO"):
        return None
    # Whatever changes an image decodes it first, and that drops the file, or of several frames the tiles.
    if image.fp is None or image.tell() or (getattr(image, "is_animated", False) and not image.tile):
        return None
    place = image.fp.tell()
    try:
        if image.fp.seek(0, io.SEEK_END) > max_bytes:
            return None
        image.fp.seek(0)
        data = image.fp.read()
    finally:
        image.fp.seek(place)
    # `draft` changes both before anything is decoded.
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as same:
        return data if (same.size, same.mode) == (image.size, image.mode) else None


def _saved(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _within(picture: PIL.Image.Image, max_bytes: int) -> bytes:
    """Make a smaller file of a picture whose PNG is too large: a server scales it down to a few hundred pixels."""
    if picture.mode.startswith("I"):
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("LA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = PIL.Image.new("RGBA", picture.size, WHITE)
        ground.alpha_composite(picture)
        picture = ground.convert("RGB")
    while True:
        for quality in (95, 85):
            data = _saved(picture, "JPEG", quality=quality, subsampling=0)
            if len(data) <= max_bytes:
                return data
        picture = picture.reduce(2)


def _plain(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a picture upright, in a mode that a PNG holds without loss."""
    # Before its EXIF is asked for: an error of the pixels is not one of the EXIF.
    image.load()
    image = _upright(image)
    if image.mode.startswith("I;16"):
        if image.mode in ("I;16", "I;16B"):
            return image
        order = "<u2" if image.mode == "I;16L" else "=u2"
        return _of_levels(np.frombuffer(image.tobytes(), order).reshape(image.height, image.width))
    if image.mode in ("I", "F"):
        return _of_numbers(np.asarray(image))
    if image.mode == "La":
        # Pillow knows no other way from there.
        image = image.convert("LA")
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    transparent = image.mode in ("PA", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Apply the EXIF orientation; where EXIF is damaged, keep the picture as stored, as servers do."""
    try:
        if image.getexif().get(ORIENTATION_TAG, 1) == 1:
            return image
        return PIL.ImageOps.exif_transpose(image)
    except (*PICTURE_ERRORS, TypeError, IndexError, KeyError):
        return image


def _of_numbers(values: npt.NDArray[Any]) -> PIL.Image.Image:
    """Read grey levels whose mode, I or F, does not say how bright white is."""
    if not values.size:
        raise exceptions.InputError("the image is empty")
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 65535:
        raise exceptions.InputError(
            f"an image with levels from {low:g} to {high:g} is no picture: white is 1, 255 or 65535, and black 0"
        )
    if values.dtype.kind == "f" and high <= 1:
        return _of_levels(np.rint(values * 255).astype(np.uint8))
    return _of_levels(np.rint(values).astype(np.uint8 if high <= 255 else np.uint16))


def _of_levels(levels: npt.NDArray[Any]) -> PIL.Image.Image:
    # The server takes the upper byte of 16-bit greys. Pillow has no 16-bit colours.
    if levels.dtype.kind == "u" and levels.dtype.itemsize == 2:
        levels = levels.astype("<u2") if levels.ndim == 2 else (levels >> 8).astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(levels))


def as_array(value: Any) -> npt.NDArray[Any] | None:
    """Take the array of anything that has one: numpy's own, tensors of torch, jax and tensorflow, series of pandas.

    Parameters
    ----------
    value
        Anything.

    Returns
    -------
    ndarray or None
        None if it has none.

    Raises
    ------
    InputError
        If it has one and does not give it.
    """
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__array__"):
        return None
    try:
        # A tensor of torch may need a gradient, lie on another device, or be of a type that numpy does not know.
        if hasattr(value, "detach") and hasattr(value, "cpu"):
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        return np.asarray(value)
    except Exception as error:
        raise exceptions.InputError(f"{type(value).__name__} gives no array: {error}") from error


def from_array(pixels: npt.NDArray[Any]) -> PIL.Image.Image:
    """Make a picture of pixels.

    Parameters
    ----------
    pixels
        Of shape [height, width], or with 1, 3 or 4 channels last or first. Floats in [0, 1], bool, uint16 in
        [0, 65535], or other integers in [0, 255].

    Returns
    -------
    PIL.Image.Image
        Grey, RGB or RGBA.

    Raises
    ------
    InputError
        If they are no picture.
    """
    levels = _levels(_channels_last(pixels))
    return _of_levels(levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels)


def _channels_last(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    shape = pixels.shape
    if len(shape) == 2 and 0 not in shape:
        return pixels
    if len(shape) == 3 and 0 not in shape:
        # Numpy's way first.
        ways = [axis for axis in (2, 0) if shape[axis] in CHANNELS]
        sides = {axis: min(side for other, side in enumerate(shape) if other != axis) for axis in ways}
        ways.sort(key=lambda axis: sides[axis] < MIN_SIDE)
        if ways:
            return np.moveaxis(pixels, ways[0], 2)
    raise exceptions.InputError(
        f"an array of {pixels.dtype} with shape {list(shape)} is no image: it has the shape [height, width], or that "
        "with 1, 3 or 4 channels behind or before it"
    )


def _levels(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind == "b":
        return pixels.astype(np.uint8) * 255
    if kind == "u" and size <= 2:
        return pixels
    # Those of other packages, such as bfloat16, have no kind of their own.
    is_float = "float" in pixels.dtype.name
    if not is_float and kind not in "iu":
        raise exceptions.InputError(f"an array of {pixels.dtype} is no image: pixels are integers or floats")
    numbers = pixels.astype(np.float32) if is_float else pixels
    low, high = numbers.min(), numbers.max()
    if is_float and -OVERSHOOT <= low <= high <= 1 + OVERSHOOT:
        unit: npt.NDArray[Any] = numbers.clip(0, 1)
        return np.asarray(np.rint(unit * 255), dtype=np.uint8)
    if not is_float and 0 <= low <= high <= 255:
        return numbers.astype(np.uint8)
    wanted = "floats lie in [0, 1], without any normalisation" if is_float else "integers lie in [0, 255]"
    raise exceptions.InputError(
        f"an array of {pixels.dtype} from {low:g} to {high:g} is no image: {wanted}, and uint16 in [0, 65535]"
    )
