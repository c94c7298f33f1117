"""The decoders of the dictionaries as numpy, for calls that change an embedding by its features.

Every kind of dictionary decodes affinely, e_hat = z D + b, so D and b are all that such a call needs after the
encoder's forward.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.bundle import Bundle
from services.modalities import Modality


@dataclass(frozen=True)
class Decoder:
    """One dictionary's decoder for one modality.

    Attributes
    ----------
    rows
        D, float32, shape (n_features, embed_dim): row j is what feature j adds to an embedding.
    origin
        b, float32, shape (embed_dim,): what no feature decodes to.
    """

    rows: NDArray[np.float32]
    origin: NDArray[np.float32]


class Decoders:
    """Decoders of a bundle, each read once, when first asked for.

    Parameters
    ----------
    bundle
        Already verified.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._read: dict[str, dict[Modality, Decoder]] = {}
        self._reading = asyncio.Lock()

    async def get(self, dictionary: str) -> dict[Modality, Decoder]:
        """Return the decoders of both modalities; `dictionary` is a full name."""
        if dictionary not in self._read:
            async with self._reading:
                if dictionary not in self._read:
                    self._read[dictionary] = await asyncio.to_thread(read_decoders, self._bundle, dictionary)
        return self._read[dictionary]


def read_decoders(bundle: Bundle, name: str) -> dict[Modality, Decoder]:
    """Read the decoders of a dictionary, by modality."""
    import torch

    dictionary = bundle.dictionary(name)
    nothing = torch.zeros(1, dictionary.n_features)
    with torch.inference_mode():
        return {
            modality: Decoder(
                np.ascontiguousarray(dictionary.decoder_rows(modality).numpy()),
                dictionary.decode(nothing, modality)[0].numpy(),
            )
            for modality in Modality
        }
