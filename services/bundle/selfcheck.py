"""A bundle's probe: pictures and texts with what the towers made of them when the bundle was made.

Weights do not say how they are to be used. Loaded under another activation function (OpenAI's towers were trained with
QuickGELU), another normalisation, resize or tokenizer, they run and are silently wrong. So whoever makes a bundle
records what the towers' own code, open_clip's, answers on a few fixed inputs, and whoever loads it compares, stage by
stage: the tokens, the pixels that the image tower takes, and the embeddings of both towers.

The inputs lie in the probe itself, so that it never depends on code that made them.
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
from services.errors import BundleFileError, ProbeMismatch, TextTooLong
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
class Probe:
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


class Tokeniser(Protocol):
    """What of `services.encoding.texts.Tokeniser` a probe needs."""

    def tokenise(self, texts: Sequence[str], truncate: bool = False) -> NDArray[np.int64]:
        """Return tokens, shape (texts, context)."""


class ProbedTowers(Protocol):
    """What of `services.encoding.towers.Towers` a probe needs."""

    precision: str

    def encode_images(self, pixels: NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, shape (B, 3, H, W)."""

    def encode_texts(self, tokens: NDArray[np.int64]) -> Embeddings:
        """Embed tokens, shape (B, context)."""


Preprocess = Callable[[Image.Image], NDArray[np.float32]]
Tokenise = Callable[[Sequence[str]], NDArray[np.int64]]


def probe_pictures() -> tuple[NDArray[np.uint8], ...]:
    """Return the pictures of a new probe: oblong both ways and square, fine-grained, every channel different.

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
PROBE_TEXTS = ("a photo of a red heart", "Two DOGS, one café!", "x=3.14", "floccinaucinihilipilification")


def sampled(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return pixels (..., H, W) thinned evenly to about `SAMPLED` a side."""
    rows, columns = (max(1, side // SAMPLED) for side in pixels.shape[-2:])
    return np.ascontiguousarray(pixels[..., ::rows, ::columns])


def record_probe(
    preprocess: Preprocess,
    tokenise: Tokenise,
    embed_images: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    embed_texts: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> Probe:
    """Run the inputs through the towers' own code.

    Parameters
    ----------
    preprocess
        From an RGB picture to float32 (3, H, W).
    tokenise
        From texts to int64 (texts, context).
    embed_images, embed_texts
        From pixels (B, 3, H, W) and tokens (B, context) to embeddings (B, d), not normalised, in float32.
    """
    pictures = probe_pictures()
    pixels = np.stack([preprocess(Image.fromarray(picture)) for picture in pictures]).astype(np.float32)
    tokens = np.asarray(tokenise(PROBE_TEXTS), np.int64)
    return Probe(
        pictures,
        PROBE_TEXTS,
        sampled(pixels),
        tokens,
        np.asarray(embed_images(pixels), np.float32),
        np.asarray(embed_texts(tokens), np.float32),
    )


def write_probe(path: Path, probe: Probe) -> None:
    """Write a probe as safetensors; the texts are its metadata."""
    tensors: dict[str, NDArray[np.generic]] = {
        **{f"pictures.{i}": picture for i, picture in enumerate(probe.pictures)},
        "pixels": probe.pixels,
        "tokens": probe.tokens,
        "images": probe.images,
        "captions": probe.captions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata={"texts": json.dumps(probe.texts)}))


def read_probe(path: Path) -> Probe:
    """Read what `write_probe` wrote.

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
        return Probe(
            pictures,
            tuple(map(str, texts)),
            *(tensors[name] for name in ("pixels", "tokens", "images", "captions")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleFileError(f"{path.name} is not a probe: {error}", [(path.name, "not a probe")]) from error


def check_bundle(bundle: Bundle, preprocess: Preprocess, tokeniser: Tokeniser, towers: ProbedTowers) -> bool:
    """Check a bundle's probe; return False where it has none, which is no error.

    Raises
    ------
    ProbeMismatch
        As `check_probe`.
    """
    if bundle.manifest.probe is None:
        return False
    probe = read_probe(bundle.path / bundle.manifest.probe)
    # The recorder may have cut its texts, and whoever serves lets a caller choose.
    check_probe(probe, preprocess, lambda texts: tokeniser.tokenise(texts, truncate=True), towers)
    return True


def check_probe(probe: Probe, preprocess: Preprocess, tokenise: Tokenise, towers: ProbedTowers) -> None:
    """Raise ProbeMismatch unless the towers answer as they did when the probe was recorded.

    Parameters
    ----------
    probe
        Of the bundle.
    preprocess, tokenise
        As they are about to be used.
    towers
        On the backend that is about to serve; its precision decides the tolerance.
    """
    _check_tokens(probe, tokenise)
    try:
        pixels = np.stack([preprocess(Image.fromarray(picture)) for picture in probe.pictures])
    except ValueError as error:
        raise _mismatch("preprocessing", f"cannot be run on the probe's pictures: {error}") from error
    _check_pixels(probe, pixels)
    # The recorded tokens: a wrong tokenizer has been told already.
    for tower, recorded, found in (
        ("image tower", probe.images, towers.encode_images(pixels)),
        ("text tower", probe.captions, towers.encode_texts(probe.tokens)),
    ):
        _check_embeddings(tower, recorded, found, towers.precision)


def _check_tokens(probe: Probe, tokenise: Tokenise) -> None:
    try:
        tokens = tokenise(probe.texts)
    except TextTooLong as error:
        raise _mismatch("tokenizer", f"cannot take the probe's texts: {error}") from error
    if tokens.shape != probe.tokens.shape:
        raise _mismatch(
            "tokenizer",
            f"has a context of {tokens.shape[1]} tokens; the towers were recorded with {probe.tokens.shape[1]}",
        )
    wrong = [text for text, a, b in zip(probe.texts, tokens, probe.tokens, strict=True) if (a != b).any()]
    if wrong:
        raise _mismatch(
            "tokenizer", f"splits {wrong[0]!r} otherwise than the one the towers were recorded with"
        )


def _check_pixels(probe: Probe, pixels: NDArray[np.float32]) -> None:
    found = sampled(pixels)
    if found.shape != probe.pixels.shape:
        raise _mismatch(
            "preprocessing",
            f"gives pictures of {pixels.shape[2]} x {pixels.shape[3]} pixels, not as recorded",
        )
    error = float(np.abs(found - probe.pixels).max())
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


def _mismatch(stage: str, what: str) -> ProbeMismatch:
    return ProbeMismatch(f"the {stage} {what}", [("probe", stage)])
