"""The decoders of the dictionaries as numpy, for calls that change an embedding by its features.

Every kind of dictionary decodes affinely, e_hat = z D + b, so D and b are all that such a call needs after the
encoder's forward.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.bundle.load import Bundle
from services.modality.modalities import Modality
from services.weights import open_weights


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
    """Read the decoders of a dictionary, by modality, from its file: building the dictionary would take torch."""
    entry = bundle.manifest.dictionaries[name]
    if entry.weights is None:
        identity = Decoder(np.eye(entry.embed_dim, dtype=np.float32), np.zeros(entry.embed_dim, np.float32))
        return dict.fromkeys(Modality, identity)
    with open_weights(bundle.path / entry.weights) as file:
        names = set(file.keys())

        def read(*candidates: str) -> NDArray[np.float32]:
            found = next(candidate for candidate in candidates if candidate in names)
            return np.ascontiguousarray(file.get_tensor(found), dtype=np.float32)

        return {
            m: Decoder(
                # A pair of dictionaries has everything twice.
                read(f"{m}.decoder", "decoder"),
                read(f"{m}.pre_bias_{m}", f"pre_bias_{m}", f"bias_{m}"),
            )
            for m in Modality
        }
