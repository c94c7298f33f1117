"""From what the caller has (paths, bytes, PIL images, arrays, tensors, strings) to the contract's inputs."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt
import PIL.Image

from monofacet import _exceptions as exceptions
from monofacet import _pictures as pictures
from monofacet.v1 import common_pb2

__all__ = ["Image", "Input", "Pair"]


class Tensor(Protocol):
    """What numpy can make an array of, such as a tensor of torch."""

    def __array__(self) -> npt.NDArray[Any]:
        """Give the array."""
        ...


# Anything that is an image: a path object, a whole PNG, JPEG or WebP file, a PIL image, or pixels. As a `str` only a
# data URI is one.
Image: TypeAlias = os.PathLike[str] | bytes | PIL.Image.Image | npt.NDArray[Any] | Tensor

# Anything that can be encoded. A `str` is a text or the data URI of an image, and never a path.
Input: TypeAlias = str | Image

# An image and its text; the third is the group, of pairs that are not independent.
Pair: TypeAlias = tuple[Image, str] | tuple[Image, str, str]

# The contract's own ceilings; a server may be set lower and says so in `Limits`.
MAX_INPUTS = 256
MAX_REQUEST_BYTES = 32 * 1024 * 1024
MAX_IMAGE_BYTES = 16 * 1024 * 1024

DATA_URI = re.compile(r"\s*data:image/[^,]*,", re.IGNORECASE)


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


def image_bytes(image: Image | str) -> bytes:
    """Read or encode one image.

    Parameters
    ----------
    image
        A path object or the bytes of a file, sent as they are; the data URI of a file, sent as the file; a PIL image
        of any mode, sent as the file that it was opened from or, once its pixels were read, without loss (see
        `_pictures.encode`); or pixels, an array or anything that numpy makes one of: shape [height, width], or with
        1, 3 or 4 channels last or first, floats in [0, 1], bool, uint16 in [0, 65535], or other integers in
        [0, 255].

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
        data = pictures.encode(image, MAX_IMAGE_BYTES)
    elif isinstance(image, os.PathLike):
        data = _read(image)
    elif isinstance(image, str) and DATA_URI.match(image):
        data = _from_uri(image)
    elif (pixels := pictures.as_array(image)) is not None:
        data = pictures.encode(pictures.from_array(pixels), MAX_IMAGE_BYTES)
    else:
        raise exceptions.InputError(
            f"{type(image).__name__} is no image: give a path object, bytes, a PIL image, an array or a data URI"
        )
    if not data:
        raise exceptions.InputError("the image is empty")
    _check_size("the image", len(data))
    return data


def _from_uri(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    data = urllib.parse.unquote_to_bytes(body)
    if not head.rstrip().lower().endswith(";base64"):
        return data
    data = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise exceptions.InputError(f"the data URI cannot be read: {error}") from error


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


def to_input(value: Input) -> common_pb2.Input:
    """Make the contract's input.

    Parameters
    ----------
    value
        A text, or an image as `image_bytes` takes it: a data URI of an image is one.

    Returns
    -------
    common_pb2.Input
        With the text or the image set.

    Raises
    ------
    InputError
        If the value cannot be sent.
    """
    if isinstance(value, str) and not DATA_URI.match(value):
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
        Texts and images; a single one is a batch of one. An array or tensor with four axes is a batch of images, an
        array of strings one of texts.

    Returns
    -------
    list of common_pb2.Input
        In the same order.

    Raises
    ------
    InputError
        If there are none, or one cannot be sent; the message says which.
    """
    items = _items(values)
    if not items:
        raise exceptions.InputError("there is nothing to encode: the inputs are empty")
    inputs = []
    for position, value in enumerate(items):
        try:
            inputs.append(to_input(value))
        except exceptions.InputError as error:
            raise exceptions.InputError(f"inputs[{position}]: {error}") from error
    return inputs


def _items(values: Any) -> list[Any]:
    if isinstance(values, str | bytes | bytearray | memoryview | os.PathLike | PIL.Image.Image):
        return [values]
    array = pictures.as_array(values)
    if array is None:
        return list(values)
    # Strings, of a fixed or any length, and Python objects: of pandas, say.
    if array.ndim == 4 or (array.ndim and array.dtype.kind in "UTO"):
        return list(array)
    return [array[()]]


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
