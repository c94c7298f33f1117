"""From the bytes of an image to the pixels a tower takes.

Bytes come from strangers, so everything that can be checked is checked before a pixel is decoded: the format
by content (PNG, JPEG or WebP, whatever the name says), the size in bytes, and the dimensions in the header.

What the picture becomes:

- the EXIF orientation is applied; all other metadata, colour profiles included, is dropped;
- transparency is composited on white, because drawings such as emoji are transparent around the figure and a
  dropped alpha channel would show the undefined colours beneath (often black);
- of an animation the first frame is taken, which is what a viewer shows first;
- 16-bit greys are scaled, not clipped, to 8 bits.

The preprocessing equals open_clip's inference transform, bit for bit. JPEGs are decoded in full: decoding at
a reduced scale is faster, but changes the pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from services.encoding.clip import ClipConfig
from services.errors import CorruptImage, ImageError, ImageTooLarge, ImageTooSmall, UnsupportedImageFormat

# Our own limit on pixels is lower, and is checked first; this is the second lock on the same door.
warnings.simplefilter("error", Image.DecompressionBombWarning)

WHITE = (255, 255, 255, 255)
ORIENTATION_TAG = 0x0112
# Of one image, as the contract says; a server may be set lower.
MAX_PIXELS = 40_000_000

# What Pillow's decoders raise on damaged data.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, TypeError)


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
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = MAX_PIXELS
    min_side: int = 4
    max_aspect_ratio: float = 32.0

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
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise UnsupportedImageFormat("not a PNG, JPEG or WebP image")


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
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"{len(data)} bytes; at most {limits.max_bytes} are accepted")
    kind = sniff_format(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"more than {limits.max_pixels} pixels") from error
    except DECODE_ERRORS as error:
        raise CorruptImage(f"not a readable {kind} image") from error
    with image:
        check_dimensions(image.width, image.height, limits)
        try:
            image.load()
            return to_rgb(upright(image))
        except DECODE_ERRORS as error:
            raise CorruptImage(f"truncated or damaged {kind} image") from error


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


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; where EXIF is damaged, keep the picture as stored, as viewers do."""
    try:
        if image.getexif().get(ORIENTATION_TAG, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as 8-bit RGB: transparency on white, 16-bit greys scaled."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8), "L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, WHITE)
        ground.alpha_composite(rgba)
        return ground.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
