"""What the service sees of a batch of pictures, computed with its own functions on the reference backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from services.defense.features import FeatureStatistics, Look
from services.defense.scores import detection_scores
from services.defense.smoothing import noise, smooth
from services.dictionaries import Dictionary, Modality
from services.encoding.towers import Towers
from training.defense.victim import Embed, Victim


@dataclass(frozen=True)
class Observed:
    """Pictures as the service sees them.

    Attributes
    ----------
    unit, twin : float32 arrays, shape (B, d)
        Embeddings of the pictures and of the smoothed pictures.
    z, twin_z : float32 arrays, shape (B, n)
        Their activations.
    noise : float32 array, shape (B,)
        r4.
    """

    unit: Float[np.ndarray, "B d"]
    smoothed: Float[np.ndarray, "B d"]
    z: Float[np.ndarray, "B n"]
    smoothed_z: Float[np.ndarray, "B n"]
    noise: Float[np.ndarray, " B"]

    def __len__(self) -> int:
        return len(self.unit)

    def look(self, i: int) -> Look:
        """Return the look at picture i."""
        return _look(self.unit[i], self.z[i])

    def smoothed_look(self, i: int) -> Look:
        """Return the look at the smoothed picture i."""
        return _look(self.smoothed[i], self.smoothed_z[i])

    def take(self, index: np.ndarray) -> Observed:
        """Return some of the pictures."""
        return Observed(*(value[index] for value in vars(self).values()))


def _look(unit: np.ndarray, z: np.ndarray) -> Look:
    active = np.flatnonzero(z)
    return Look(unit, active, z[active])


def join(parts: Sequence[Observed]) -> Observed:
    """Return several batches as one."""
    return Observed(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


@dataclass(frozen=True)
class Looks:
    """The part of `Observed` that is of the towers alone; the same attributes."""

    unit: Float[np.ndarray, "B d"]
    smoothed: Float[np.ndarray, "B d"]
    noise: Float[np.ndarray, " B"]


@torch.no_grad()
def look_twice(embed: Embed, images: Float[Tensor, "B 3 H W"]) -> Looks:
    """Look at pictures in [0, 1] twice; `embed` is a `Victim`, or towers by `embed_with`."""
    units, smoothed, levels = [], [], []
    for chunk in images.split(32):
        units.append(embed(chunk))
        smoothed.append(embed(smooth(chunk)))
        levels.append(noise(chunk))
    return Looks(*(torch.cat(parts).numpy() for parts in (units, smoothed, levels)))


@torch.no_grad()
def observed_from(looks: Looks, dictionary: Dictionary) -> Observed:
    """Add the activations in a dictionary."""
    z, smoothed_z = (
        dictionary.encode(torch.from_numpy(e), Modality.IMAGE).numpy() for e in (looks.unit, looks.smoothed)
    )
    return Observed(looks.unit, looks.smoothed, z, smoothed_z, looks.noise)


def observe(embed: Embed, dictionary: Dictionary, images: Float[Tensor, "B 3 H W"]) -> Observed:
    """Look at pictures in [0, 1] twice, and at their features."""
    return observed_from(look_twice(embed, images), dictionary)


def embed_with(towers: Towers, victim: Victim) -> Embed:
    """Return the embedding of pictures by towers as they are served: another backend, another precision."""

    def embed(images: Tensor) -> Tensor:
        pixels = ((images - victim.mean) / victim.std).numpy()
        return torch.from_numpy(towers.encode_images(pixels).unit)

    return embed


@dataclass(frozen=True)
class Decoder:
    """D, float32 (n, d), and b, float32 (d,), of a dictionary for images."""

    rows: Float[np.ndarray, "n d"]
    origin: Float[np.ndarray, " d"]

    @classmethod
    def of(cls, dictionary: Dictionary) -> Decoder:
        """Read them."""
        with torch.no_grad():
            nothing = torch.zeros(1, dictionary.n_features)
            return cls(
                dictionary.decoder_rows(Modality.IMAGE).numpy().copy(),
                dictionary.decode(nothing, Modality.IMAGE)[0].numpy(),
            )


def scores(
    observed: Observed, statistics: FeatureStatistics, decoder: Decoder, second_look: bool
) -> Float[np.ndarray, "B k"]:
    """Return the detection scores of every picture."""
    return np.stack(
        [
            detection_scores(
                observed.look(i),
                float(observed.noise[i]),
                observed.smoothed_look(i) if second_look else None,
                statistics,
                decoder.rows,
                decoder.origin,
            )
            for i in range(len(observed))
        ]
    )
