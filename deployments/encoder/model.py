"""A bundle's towers and dictionaries as the encoder wants them: one item at a time in, batches through."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.encoder.tasks import EncoderInfo
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.bundle.selfcheck import check_bundle
from services.bundle.towers import choose_towers, load_towers
from services.check import Check, nothing
from services.defense.smoothing import noise, smooth
from services.dictionaries.base import Dictionary
from services.encoding.formats.picture import Picture
from services.encoding.images import ImagePreprocess, decode_picture, open_image
from services.encoding.texts import TextLimits, Tokenizer
from services.encoding.towers import Towers
from services.weights import open_weights

log = logging.getLogger("monofacet.encoder")


def count_parameters(weights: Path) -> int:
    """Return the number of values in a safetensors file, from its header alone."""
    with open_weights(weights) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def tuned_towers(bundle: Bundle, settings: Settings) -> tuple[Towers, int]:
    """Load the towers as the settings say, measuring what they leave open; return them and their threads."""
    if not settings.tune:
        towers = load_towers(bundle, settings.backend, threads=settings.threads, precision=settings.precision)
        return towers, settings.threads
    # A number that somebody set is kept; the default is only the first guess.
    threads = settings.threads if "threads" in settings.model_fields_set else None
    towers, choice = choose_towers(bundle, settings.backend, threads=threads, precision=settings.precision)
    log.info("towers: %s (%.1f s)", choice.why, choice.seconds)
    return towers, choice.candidate.threads


class TowerModel:
    """The towers of a bundle with their preprocessing; implements `deployments.encoder.encoder.Model`.

    Parameters
    ----------
    bundle
        Already verified.
    settings
        Backend, threads and limits.

    Raises
    ------
    SelfCheckMismatch
        Where the towers, as they run here, answer otherwise than when the bundle was made.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        config = bundle.clip_config
        self._preprocess = ImagePreprocess(config)
        self._image_limits = settings.image_limits
        # The gateway counts bytes, of which a text never has fewer than characters.
        self._tokenizer = Tokenizer(config, TextLimits(settings.max_text_bytes))
        self._towers, self._threads = tuned_towers(bundle, settings)
        check_bundle(bundle, self._preprocess, self._tokenizer, self._towers)
        self._parameters = count_parameters(bundle.clip_weights)

    def warm_up(self, max_batch: int) -> None:
        """Run every batch size once, so that no caller pays for a first time."""
        self._towers.warm_up(max_batch)

    def tokenize(self, text: str, truncate: bool) -> NDArray[Any]:
        """Return tokens int64 (context,) of a text."""
        tokens: NDArray[Any] = self._tokenizer.tokenize([text], truncate)[0]
        return tokens

    def open(self, data: bytes) -> Picture:
        """Read what an image file says of itself, and refuse what is too large or too costly."""
        return open_image(data, self._image_limits)

    def decode(self, picture: Picture, check: Check = nothing) -> NDArray[Any]:
        """Return pixels float32 (3, H, W) of what was opened."""
        return self._preprocess(decode_picture(picture, check))

    def encode_images(self, pixels: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return unit embeddings (batch, d) and norms (batch,) of pixels (batch, 3, H, W)."""
        embeddings = self._towers.encode_images(pixels)
        return embeddings.unit, embeddings.norm

    def encode_texts(self, tokens: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return unit embeddings (batch, d) and norms (batch,) of tokens (batch, context)."""
        embeddings = self._towers.encode_texts(tokens)
        return embeddings.unit, embeddings.norm

    def noise(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return how noisy each image of pixels (batch, 3, H, W) is, float32 (batch,)."""
        # Of the picture, so the towers' scaling is undone; their shift does not count.
        with torch.inference_mode():
            level: NDArray[np.float32] = noise(torch.from_numpy(pixels * self._preprocess.std)).numpy()
        return level

    def smooth(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return pixels (batch, 3, H, W) smoothed, scaled as the towers take them."""
        mean, std = self._preprocess.mean, self._preprocess.std
        with torch.inference_mode():
            smoothed: NDArray[np.float32] = smooth(torch.from_numpy(pixels * std + mean)).numpy()
        return (smoothed - mean) / std

    def info(self) -> EncoderInfo:
        """Describe the towers and what they run on."""
        towers = self._towers
        return EncoderInfo(
            backend=towers.backend,
            device=towers.device,
            # The contract's words for what the towers call f32, bf16 and f16.
            precision={"f32": "fp32", "f16": "fp16"}.get(towers.precision, towers.precision),
            threads=self._threads,
            embed_dim=towers.embed_dim,
            image_size=towers.image_size[0],
            context_length=towers.context_length,
            logit_scale=towers.logit_scale,
            parameters=self._parameters,
        )

    def close(self) -> None:
        """Free the towers."""
        self._towers.close()


def load_dictionaries(bundle: Bundle) -> dict[str, Dictionary]:
    """Load every dictionary of `bundle`, by name."""
    return {name: bundle.dictionary(name) for name in bundle.dictionary_names}
