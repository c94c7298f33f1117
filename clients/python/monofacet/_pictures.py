"""Pictures by Pillow, whose errors have no base class of their own."""

from __future__ import annotations

import io
import struct

import PIL.Image

from monofacet import _exceptions as exceptions

# What Pillow raises for a picture that it cannot read or write: ValueError for an over-long text chunk too.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)

# The contract's formats; Pillow knows many more, and not all of them are harmless to decode.
FORMATS = ("PNG", "JPEG", "WEBP")


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
