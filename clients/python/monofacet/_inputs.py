"""From what the caller has (paths, bytes, PIL images, arrays, strings) to the contract's inputs."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from monofacet import _exceptions as exceptions
from monofacet._pictures import PICTURE_ERRORS
from monofacet.v1 import common_pb2

__all__ = ["Image", "Input", "Pair"]

# Anything that is an image: a path object, a whole PNG, JPEG or WebP file, a PIL image, or pixels.
Image: TypeAlias = os.PathLike[str] | bytes | PIL.Image.Image | npt.NDArray[Any]

# Anything that can be encoded. A `str` is always a text, never a path.
Input: TypeAlias = str | Image

# An image and its text; the third is the group, of pairs that are not independent.
Pair: TypeAlias = tuple[Image, str] | tuple[Image, str, str]

# The contract's own ceilings; a server may be set lower and says so in `Limits`.
MAX_INPUTS = 256
MAX_REQUEST_BYTES = 32 * 1024 * 1024
MAX_IMAGE_BYTES = 16 * 1024 * 1024


@contextlib.contextmanager
def sendable(what: str) -> Iterator[None]:
    """Say what cannot be sent where protobuf refuses a value; around a block, or as a decorator.

    Parameters
    ----------
    what
        What is made, for the message.

    Raises
    ------
    InputError
        If a value has a wrong type, is out of range, or is a text with a lone surrogate, which UTF-8 cannot carry.
    """
    try:
        yield
    except exceptions.InputError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise exceptions.InputError(f"{what} cannot be sent: {error}") from error


def image_bytes(image: Image) -> bytes:
    """Read or encode one image.

    Parameters
    ----------
    image
        A path object (sent as it is on disk), the bytes of a file (sent as they are), a PIL image, or pixels
        as uint8 of shape [height, width], [height, width, 3] or [height, width, 4] (both sent as PNG, without
        loss).

    Returns
    -------
    bytes
        A whole image file. Its content is for the server to judge.

    Raises
    ------
    InputError
        If the file or the picture cannot be read, it is larger than any server takes, or the value is no image.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
    elif isinstance(image, PIL.Image.Image):
        data = _png(image)
    elif isinstance(image, np.ndarray):
        data = _png(_from_array(image))
    elif isinstance(image, os.PathLike):
        data = _read(image)
    else:
        raise exceptions.InputError(
            f"{type(image).__name__} is no image: give a path object, bytes, a PIL image or a uint8 array"
        )
    if not data:
        raise exceptions.InputError("the image is empty")
    _check_size("the image", len(data))
    return data


def _check_size(what: str, size: int) -> None:
    # Not left to the server: a message past its limit ends the whole stream, not the one item.
    if size > MAX_IMAGE_BYTES:
        raise exceptions.InputError(f"{what} has {size:,} bytes; at most {MAX_IMAGE_BYTES:,} can be sent")


def _read(path: os.PathLike[str]) -> bytes:
    try:
        # Looked at before it is read: a film or a disk image would fill the memory first.
        with sendable(str(path)):  # A null byte, say, is no OSError.
            _check_size(str(path), os.stat(path).st_size)
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise exceptions.InputError(f"cannot read {path}: {error.strerror}") from error


def _from_array(pixels: npt.NDArray[Any]) -> PIL.Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (2, 3)
        or channels not in (1, 3, 4)
        or 0 in pixels.shape
    ):
        raise exceptions.InputError(
            f"an array of {pixels.dtype} with shape {list(pixels.shape)} is no image: it takes uint8 "
            "in [0, 255] of shape [height, width], [height, width, 3] or [height, width, 4]"
        )
    return PIL.Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)
    )


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        if image.mode not in ("L", "RGB", "RGBA"):
            transparent = image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info
            image = image.convert("RGBA" if transparent else "RGB")
        # Level 1 is several times faster than the default, for a few per cent of size.
        image.save(buffer, "PNG", compress_level=1)
    except PICTURE_ERRORS as error:
        # An opened file is decoded only now; an image may also be closed, or have no pixels.
        raise exceptions.InputError(f"the image cannot be read: {error}") from error
    data = buffer.getvalue()
    _check_size("the image as PNG", len(data))
    return data


def to_input(value: Input) -> common_pb2.Input:
    """Make the contract's input.

    Parameters
    ----------
    value
        A text, or an image as `image_bytes` takes it.

    Returns
    -------
    common_pb2.Input
        With the text or the image set.

    Raises
    ------
    InputError
        If the value cannot be sent.
    """
    if isinstance(value, str):
        with sendable("the text"):
            message = common_pb2.Input(text=value)
        _check_size("the text", message.ByteSize())
        return message
    return common_pb2.Input(image=common_pb2.Image(data=image_bytes(value)))


def to_inputs(values: Input | Iterable[Input]) -> list[common_pb2.Input]:
    """Make a batch.

    Parameters
    ----------
    values
        Texts and images; a single one is a batch of one.

    Returns
    -------
    list of common_pb2.Input
        In the same order.

    Raises
    ------
    InputError
        If there are none, or one cannot be sent; the message says which.
    """
    single = isinstance(
        values, str | bytes | bytearray | memoryview | os.PathLike | PIL.Image.Image | np.ndarray
    )
    items: Sequence[Input] = [values] if single else list(values)  # type: ignore[list-item, arg-type]
    if not items:
        raise exceptions.InputError("there is nothing to encode: the inputs are empty")
    inputs = []
    for position, value in enumerate(items):
        try:
            inputs.append(to_input(value))
        except exceptions.InputError as error:
            raise exceptions.InputError(f"inputs[{position}]: {error}") from error
    return inputs


def split(
    inputs: Sequence[common_pb2.Input], max_inputs: int = MAX_INPUTS, max_bytes: int = MAX_REQUEST_BYTES
) -> list[Sequence[common_pb2.Input]]:
    """Cut a batch into parts that each fit a request.

    Parameters
    ----------
    inputs
        The whole batch.
    max_inputs
        Inputs a request.
    max_bytes
        Bytes a request, less what it carries besides its inputs. An input that is too large alone gets a part of
        its own, and the server's refusal.

    Returns
    -------
    list of sequences
        The parts, in order; one if everything fits.
    """
    # Room for what frames the inputs.
    budget = max_bytes - 4096
    parts: list[Sequence[common_pb2.Input]] = []
    start = size = 0
    for position, item in enumerate(inputs):
        length = item.ByteSize() + 8
        if position > start and (position - start == max_inputs or size + length > budget):
            parts.append(inputs[start:position])
            start, size = position, 0
        size += length
    parts.append(inputs[start:])
    return parts
