"""From the bytes of an image to the pixels a tower takes.

Bytes come from callers who are not trusted, so everything that can be checked is checked before a pixel is decoded:
the format by content (PNG, JPEG or WebP, whatever the name says), the size in bytes, the dimensions, and what decoding
will cost.

What the picture becomes:

- the EXIF orientation is applied; all other metadata, colour profiles included, is dropped unread, so that none is
  refused for it (`services.encoding.formats`);
- transparency is composited on white, because drawings such as emoji are transparent around the figure and a
  dropped alpha channel would show the undefined colours beneath (often black);
- of an animation the first frame is taken, which is what a viewer shows first;
- 16-bit greys are scaled, not clipped, to 8 bits;
- of a JPEG that lacks its end marker all pixels must be there.

The preprocessing equals open_clip's inference transform, bit for bit. JPEGs are decoded in full: decoding at
a reduced scale is faster, but changes the pixels.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from services.check import Check, nothing
from services.encoding.clip import ClipConfig
from services.encoding.formats import jpeg, png, webp
from services.encoding.formats.picture import Picture
from services.errors import (
    CorruptImage,
    ImageError,
    ImageTooCostly,
    ImageTooLarge,
    ImageTooSmall,
    UnsupportedImageFormat,
)

# Our own limit on pixels is lower, and is checked first; this is the second lock on the same door.
warnings.simplefilter("error", Image.DecompressionBombWarning)

WHITE = (255, 255, 255, 255)
# Of one image, as the contract says; a server may be set lower.
MAX_PIXELS = 40_000_000

# What Pillow's decoders raise on damaged data.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, TypeError)

_READERS = {"PNG": png.read, "JPEG": jpeg.read, "WEBP": webp.read}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What is put behind the pixels of a JPEG that lacks its end: where all of them are there, nobody reads it. The two
# differ from their first bit on, so that a single value that is missing is another one with each.
_TAILS = tuple(tail + jpeg.END for tail in (bytes(64), b"\xaa\x5b\xc3\x96" * 16))
# Pixels that are put on white at once: bounds what that takes beside the picture itself.
_STRIP_PIXELS = 1_000_000
# Steps of decoding, at least, between which it can be told to end, and bytes of one, at least; but what takes so few
# seconds is decoded as Pillow does, in steps of 64 KiB.
_STEPS, _STEP_BYTES, _QUICK_S = 64, 4_096, 0.1


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be.

    Attributes
    ----------
    max_bytes : int
        Of the encoded image.
    max_pixels : int
        Width times height. At most Pillow's own limit, so that its check never is the first to speak.
    min_side : int
        Pixels; a shorter side holds nothing to see.
    max_aspect_ratio : float
        Long side over short side. Resizing the short side of a sliver to the tower's input would make the
        long side, and the memory, enormous.
    max_decode_s : float
        Seconds of one core that decoding may take, by an estimate from the headers that is the same on all machines.
    max_parts : int
        Chunks of a PNG or WebP, markers of a JPEG.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = MAX_PIXELS
    min_side: int = 4
    max_aspect_ratio: float = 32.0
    max_decode_s: float = 4.0
    max_parts: int = 16_384

    def __post_init__(self) -> None:
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"max_pixels must be at most {Image.MAX_IMAGE_PIXELS}")


DEFAULT_LIMITS = ImageLimits()


def sniff_format(data: bytes) -> str:
    """Return "PNG", "JPEG" or "WEBP", judged by the first bytes.

    Raises
    ------
    UnsupportedImageFormat
        For anything else.
    """
    if data[:8] == png.SIGNATURE:
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise UnsupportedImageFormat("not a PNG, JPEG or WebP image")


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """Read what a file says of itself and check it, before anything is decoded; takes time linear in its size.

    Parameters
    ----------
    data : bytes
        Encoded image.
    limits : ImageLimits
        What is accepted.

    Raises
    ------
    ImageError
        Of the kind that says why.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"{len(data)} bytes; at most {limits.max_bytes} are accepted")
    picture = _READERS[sniff_format(data)](data, limits.max_parts)
    check_dimensions(picture.width, picture.height, limits)
    if picture.seconds > limits.max_decode_s:
        raise ImageTooCostly(
            f"decoding would take {picture.seconds:.1f} s by estimate, for its scans or its size; "
            f"at most {limits.max_decode_s:g} s are accepted"
        )
    return picture


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode an image to 8-bit RGB, upright, on white.

    Parameters
    ----------
    data : bytes
        Encoded image.
    limits : ImageLimits
        What is accepted.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, without metadata.

    Raises
    ------
    ImageError
        Of the kind that says why.
    """
    return decode_picture(open_image(data, limits))


def decode_picture(picture: Picture, check: Check = nothing) -> Image.Image:
    """Decode what `open_image` returned to 8-bit RGB, upright, on white.

    Parameters
    ----------
    picture : Picture
        What is to be decoded.
    check : callable
        Called between steps; what it raises ends the decoding.

    Raises
    ------
    CorruptImage
        Where the pixels are damaged or not all there.
    """
    try:
        image = to_rgb(_pixels(picture, check), picture, check)
        check()
        turn = _TURNS.get(picture.orientation)
        return image if turn is None else image.transpose(turn)
    except DECODE_ERRORS as error:
        raise CorruptImage(f"truncated or damaged {picture.kind} image") from error


def _pixels(picture: Picture, check: Check) -> Image.Image:
    if not picture.unended:
        return _load(picture, check)
    image, other = (_load(picture, check, tail) for tail in _TAILS)
    if ImageChops.difference(image, other).getbbox():
        raise CorruptImage("a JPEG that ends before all of its pixels")
    return image


class _Watched(io.BytesIO):
    """A file in memory; each read of it runs the check that may end the decoding."""

    def __init__(self, data: bytes, check: Check) -> None:
        super().__init__(data)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


def _load(picture: Picture, check: Check, tail: bytes = b"", raw_mode: str = "") -> Image.Image:
    """Return the pixels as Pillow reads them, with `tail` behind the file, or as `raw_mode` has them."""
    data = picture.data + tail
    with Image.open(_Watched(data, check), formats=[picture.kind]) as image:
        if picture.seconds > _QUICK_S:
            image.decodermaxblock = max(_STEP_BYTES, len(data) // _STEPS)
        if raw_mode:
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        image.load()
        return image


def check_dimensions(width: int, height: int, limits: ImageLimits) -> None:
    """Raise ImageTooLarge or ImageTooSmall where the header's dimensions (pixels) break the limits."""
    if width * height > limits.max_pixels:
        raise ImageTooLarge(f"{width} x {height} pixels; at most {limits.max_pixels} are accepted")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(f"{width} x {height} pixels; each side must be at least {limits.min_side}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ImageTooLarge(
            f"{width} x {height} pixels; one side may be at most {limits.max_aspect_ratio:g} times the other"
        )


def to_rgb(image: Image.Image, picture: Picture, check: Check = nothing) -> Image.Image:
    """Return the picture as 8-bit RGB: transparency on white, 16-bit greys scaled."""
    key = picture.transparent
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        high = (grey >> 8).astype(np.uint8)
        if key is not None:
            high[grey == key[0]] = 255
        return Image.fromarray(high, "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image, check)
    if key is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    if len(key) == 1:
        grey_levels = image.convert("L")
        mask = _equal(grey_levels, key[0] * 255 // ((1 << picture.depth) - 1))
        ground: int | tuple[int, int, int] = 255
        grey_levels.paste(ground, mask=mask)
        return grey_levels.convert("RGB")
    planes = list(zip(image.split(), (value >> (picture.depth - 8) for value in key), strict=True))
    if picture.depth == 16:
        # Pillow keeps the upper bytes; read as if the file were little-endian, these are the lower ones.
        lower = _load(picture, check, raw_mode="RGB;16L")
        planes += zip(lower.split(), (value & 255 for value in key), strict=True)
    mask = functools.reduce(ImageChops.darker, (_equal(plane, value) for plane, value in planes))
    image.paste(WHITE[:3], mask=mask)
    return image


def _equal(plane: Image.Image, value: int) -> Image.Image:
    """Return 255 where the plane has the value, else 0."""
    return plane.point([255 if level == value else 0 for level in range(256)])


def _on_white(image: Image.Image, check: Check) -> Image.Image:
    """Composite on white, strip by strip: in one go it would take four times the memory of the picture."""
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        check()
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        ground = Image.new("RGBA", strip.size, WHITE)
        ground.alpha_composite(strip)
        result.paste(ground.convert("RGB"), (0, top))
    return result


class ImagePreprocess:
    """open_clip's inference preprocessing: resize, crop or pad, scale, normalise.

    Parameters
    ----------
    config : ClipConfig
        Of the towers.
    """

    def __init__(self, config: ClipConfig) -> None:
        self.size = config.image_size
        self.resize_mode = config.resize_mode
        self.fill_color = config.fill_color
        bilinear = config.interpolation == "bilinear"
        self.resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        self.mean = np.array(config.mean, np.float32)[:, None, None]
        self.std = np.array(config.std, np.float32)[:, None, None]

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the tower's input, float32, shape (3, H, W), for an RGB image."""
        pixels = np.ascontiguousarray(np.asarray(self.fit(image)).transpose(2, 0, 1), dtype=np.float32)
        # torchvision's own order of operations, in its own precision, so that the bits are the same.
        pixels /= np.float32(255)
        pixels -= self.mean
        pixels /= self.std
        return pixels

    def fit(self, image: Image.Image) -> Image.Image:
        """Return the image at the tower's size, by the config's resize mode."""
        height, width = self.size
        if self.resize_mode == "squash":
            return self._resize(image, width, height)
        if self.resize_mode == "longest":
            ratio = max(image.height / height, image.width / width)
            image = self._resize(image, round(image.width / ratio), round(image.height / ratio))
            return _centre(image, width, height, self.fill_color)
        if height == width:
            # torchvision truncates the long side; open_clip's own class, used for oblong inputs, rounds it.
            short = min(image.width, image.height)
            scaled = (int(height * image.width / short), int(height * image.height / short))
        else:
            ratio = min(image.height / height, image.width / width)
            scaled = (round(image.width / ratio), round(image.height / ratio))
        return _centre(self._resize(image, *scaled), width, height, self.fill_color)

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image if image.size == (width, height) else image.resize((width, height), self.resample)


def _centre(image: Image.Image, width: int, height: int, fill: int) -> Image.Image:
    """Crop or pad to the size, around the centre, with torchvision's rounding."""
    pad_width, pad_height = max(width - image.width, 0), max(height - image.height, 0)
    if pad_width or pad_height:
        ground = Image.new("RGB", (image.width + pad_width, image.height + pad_height), (fill, fill, fill))
        ground.paste(image, (pad_width // 2, pad_height // 2))
        image = ground
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def load_pixels(
    images: Sequence[bytes],
    preprocess: ImagePreprocess,
    limits: ImageLimits = DEFAULT_LIMITS,
    field_path: Callable[[int], str] = "images[{}].data".format,
) -> NDArray[np.float32]:
    """Decode and preprocess a batch; nothing is returned if one item is bad.

    Parameters
    ----------
    images : sequence of bytes
        Encoded images.
    preprocess : ImagePreprocess
        Of the towers.
    limits : ImageLimits
        What is accepted.
    field_path : callable
        From an item's number to its path in the request, for the error.

    Returns
    -------
    float32 array, shape (B, 3, H, W)

    Raises
    ------
    InvalidInput
        Naming every bad item.
    """
    pixels = np.empty((len(images), 3, *preprocess.size), np.float32)
    errors: list[ImageError] = []
    for i, data in enumerate(images):
        try:
            pixels[i] = preprocess(decode_image(data, limits))
        except ImageError as error:
            blamed = error.at(field_path(i))
            errors.append(blamed if isinstance(blamed, ImageError) else error)
    if errors:
        raise ImageError.gather(errors)
    return pixels
