"""A bundle's self-check: pictures and texts with what the towers made of them when the bundle was made.

Weights do not say how they are to be used. Loaded under another activation function (OpenAI's towers were trained with
QuickGELU), another normalisation, resize or tokenizer, they run and are silently wrong. So whoever makes a bundle
records what the towers' own code, open_clip's, answers on a few fixed inputs, and whoever loads it compares, stage by
stage: the tokens, the pixels that the image tower takes, and the embeddings of both towers.

The inputs lie in the self-check itself, so that it never depends on code that made them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

from services.bundle.load import Bundle
from services.encoding.towers import Embeddings
from services.errors import BundleFileError, SelfCheckMismatch, TextTooLong
from services.weights import open_weights

# Two of 255 levels over CLIP's own deviation, 0.26: another release of Pillow may round a resize otherwise, another
# resize, size or normalisation moves the pixels of these pictures much further.
PIXEL_TOLERANCE = 0.03
# 1 - cosine, which is half the square of the relative error. In float32 other kernels add up in other orders, to a
# relative 1e-5 or so: 1e-10. Half the arithmetic was measured at 6e-5 (bf16 on a CPU, ViT-B-32).
COSINE_TOLERANCE = {"f32": 1e-6, "bf16": 2e-3, "f16": 2e-3}
# Relative, of the length before it is normalised.
NORM_TOLERANCE = {"f32": 2e-3, "bf16": 0.05, "f16": 0.05}
# Sampled pixels a side: enough to tell one preprocessing from another, few enough for a file.
SAMPLED = 24


@dataclass(frozen=True)
class SelfCheck:
    """Inputs, and what became of them at each stage.

    Attributes
    ----------
    pictures
        uint8, each of shape (height, width, 3).
    texts
        As many as there are rows of tokens.
    pixels
        What the image tower takes, thinned by `sampled`: float32, shape (pictures, 3, h, w).
    tokens
        int64, shape (texts, context).
    images, captions
        Embeddings before they are normalised, float32, shapes (pictures, d) and (texts, d).
    """

    pictures: tuple[NDArray[np.uint8], ...]
    texts: tuple[str, ...]
    pixels: NDArray[np.float32]
    tokens: NDArray[np.int64]
    images: NDArray[np.float32]
    captions: NDArray[np.float32]


class Tokenizer(Protocol):
    """What of `services.encoding.texts.Tokenizer` a self-check needs."""

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> NDArray[np.int64]:
        """Return tokens, shape (texts, context)."""


class CheckedTowers(Protocol):
    """What of `services.encoding.towers.Towers` a self-check needs."""

    precision: str

    def encode_images(self, pixels: NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, shape (B, 3, H, W)."""

    def encode_texts(self, tokens: NDArray[np.int64]) -> Embeddings:
        """Embed tokens, shape (B, context)."""


Preprocess = Callable[[Image.Image], NDArray[np.float32]]
Tokenize = Callable[[Sequence[str]], NDArray[np.int64]]


def selfcheck_pictures() -> tuple[NDArray[np.uint8], ...]:
    """Return the pictures of a new self-check: oblong both ways and square, fine-grained, every channel different.

    An upright and a wide one tell a crop from a squeeze; detail of a pixel tells one resize from another; coloured
    gradients tell channels and normalisation.
    """

    def picture(height: int, width: int, period: int) -> NDArray[np.uint8]:
        y, x = np.mgrid[:height, :width].astype(np.int64)
        texture = ((x * 2654435761 ^ y * 40503) >> 7) & 127
        channels = (
            texture + x * 128 // width,
            (x // period + y // period) % 2 * 160 + texture // 4,
            255 - y * 200 // height - texture // 8,
        )
        return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)

    return picture(150, 200, 5), picture(120, 80, 3), picture(48, 48, 2)


# Case, punctuation, digits, an accent and a word of many pieces: what one tokenizer cleans and splits otherwise than
# another. All fit 16 tokens, the shortest context of any tower here.
SELFCHECK_TEXTS = ("a photo of a red heart", "Two DOGS, one café!", "x=3.14", "floccinaucinihilipilification")


def sampled(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return pixels (..., H, W) thinned evenly to about `SAMPLED` a side."""
    rows, columns = (max(1, side // SAMPLED) for side in pixels.shape[-2:])
    return np.ascontiguousarray(pixels[..., ::rows, ::columns])


def record_selfcheck(
    preprocess: Preprocess,
    tokenize: Tokenize,
    embed_images: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    embed_texts: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> SelfCheck:
    """Run the inputs through the towers' own code.

    Parameters
    ----------
    preprocess
        From an RGB picture to float32 (3, H, W).
    tokenize
        From texts to int64 (texts, context).
    embed_images, embed_texts
        From pixels (B, 3, H, W) and tokens (B, context) to embeddings (B, d), not normalised, in float32.
    """
    pictures = selfcheck_pictures()
    pixels = np.stack([preprocess(Image.fromarray(picture)) for picture in pictures]).astype(np.float32)
    tokens = np.asarray(tokenize(SELFCHECK_TEXTS), np.int64)
    return SelfCheck(
        pictures,
        SELFCHECK_TEXTS,
        sampled(pixels),
        tokens,
        np.asarray(embed_images(pixels), np.float32),
        np.asarray(embed_texts(tokens), np.float32),
    )


def write_selfcheck(path: Path, recorded: SelfCheck) -> None:
    """Write a self-check as safetensors; the texts are its metadata."""
    tensors: dict[str, NDArray[np.generic]] = {
        **{f"pictures.{i}": picture for i, picture in enumerate(recorded.pictures)},
        "pixels": recorded.pixels,
        "tokens": recorded.tokens,
        "images": recorded.images,
        "captions": recorded.captions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata={"texts": json.dumps(recorded.texts)}))


def read_selfcheck(path: Path) -> SelfCheck:
    """Read what `write_selfcheck` wrote.

    Raises
    ------
    BundleFileError
        Where it is no such file.
    """
    try:
        with open_weights(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = json.loads(file.metadata()["texts"])
        pictures = tuple(tensors[f"pictures.{i}"] for i in range(len(tensors) - 4))
        return SelfCheck(
            pictures,
            tuple(map(str, texts)),
            *(tensors[name] for name in ("pixels", "tokens", "images", "captions")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleFileError(
            f"{path.name} is not a self-check: {error}", [(path.name, "not a self-check")]
        ) from error


def check_bundle(bundle: Bundle, preprocess: Preprocess, tokenizer: Tokenizer, towers: CheckedTowers) -> bool:
    """Check a bundle's self-check; return False where it has none, which is no error.

    Raises
    ------
    SelfCheckMismatch
        As `check_selfcheck`.
    """
    if bundle.manifest.probe is None:
        return False
    recorded = read_selfcheck(bundle.path / bundle.manifest.probe)
    # The recorder may have cut its texts, and whoever serves lets a caller choose.
    check_selfcheck(recorded, preprocess, lambda texts: tokenizer.tokenize(texts, truncate=True), towers)
    return True


def check_selfcheck(
    recorded: SelfCheck, preprocess: Preprocess, tokenize: Tokenize, towers: CheckedTowers
) -> None:
    """Raise SelfCheckMismatch unless the towers answer as they did when the self-check was recorded.

    Parameters
    ----------
    recorded
        Of the bundle.
    preprocess, tokenize
        As they are about to be used.
    towers
        On the backend that is about to serve; its precision decides the tolerance.
    """
    _check_tokens(recorded, tokenize)
    try:
        pixels = np.stack([preprocess(Image.fromarray(picture)) for picture in recorded.pictures])
    except ValueError as error:
        raise _mismatch("preprocessing", f"cannot be run on the self-check's pictures: {error}") from error
    _check_pixels(recorded, pixels)
    # The recorded tokens: a wrong tokenizer has been told already.
    for tower, expected, found in (
        ("image tower", recorded.images, towers.encode_images(pixels)),
        ("text tower", recorded.captions, towers.encode_texts(recorded.tokens)),
    ):
        _check_embeddings(tower, expected, found, towers.precision)


def _check_tokens(recorded: SelfCheck, tokenize: Tokenize) -> None:
    try:
        tokens = tokenize(recorded.texts)
    except TextTooLong as error:
        raise _mismatch("tokenizer", f"cannot take the self-check's texts: {error}") from error
    if tokens.shape != recorded.tokens.shape:
        raise _mismatch(
            "tokenizer",
            f"has a context of {tokens.shape[1]} tokens; the towers were recorded with {recorded.tokens.shape[1]}",
        )
    wrong = [
        text for text, a, b in zip(recorded.texts, tokens, recorded.tokens, strict=True) if (a != b).any()
    ]
    if wrong:
        raise _mismatch(
            "tokenizer", f"splits {wrong[0]!r} otherwise than the one the towers were recorded with"
        )


def _check_pixels(recorded: SelfCheck, pixels: NDArray[np.float32]) -> None:
    found = sampled(pixels)
    if found.shape != recorded.pixels.shape:
        raise _mismatch(
            "preprocessing",
            f"gives pictures of {pixels.shape[2]} x {pixels.shape[3]} pixels, not as recorded",
        )
    error = float(np.abs(found - recorded.pixels).max())
    if not error <= PIXEL_TOLERANCE:
        raise _mismatch(
            "preprocessing",
            f"(mean, std, size, interpolation or resize mode) moves pixels by up to {error:.3f}; {PIXEL_TOLERANCE} is "
            "the tolerance",
        )


def _check_embeddings(tower: str, recorded: NDArray[np.float32], found: Embeddings, precision: str) -> None:
    if recorded.shape != found.unit.shape:
        raise _mismatch(tower, f"gives {found.unit.shape[1]} dimensions, not {recorded.shape[1]}")
    expected = Embeddings.of(recorded)
    cosines = np.einsum("bd,bd->b", expected.unit, found.unit, dtype=np.float64)
    turned = float((1 - cosines).max())
    stretched = float(np.abs(found.norm / expected.norm - 1).max())
    # A comparison with NaN is false.
    if not (turned <= COSINE_TOLERANCE[precision] and stretched <= NORM_TOLERANCE[precision]):
        raise _mismatch(
            tower,
            f"answers otherwise than when the bundle was made: 1 - cosine up to {turned:.2g} "
            f"({COSINE_TOLERANCE[precision]:g} is the tolerance in {precision}), length off by {stretched:.2g}; a "
            "configuration with or without quick_gelu, against the weights, does this",
        )


def _mismatch(stage: str, what: str) -> SelfCheckMismatch:
    return SelfCheckMismatch(f"the {stage} {what}", [("probe", stage)])
