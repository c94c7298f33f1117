"""The bundle's ``bias/``: what a study learnt of gender in the towers, for calls that have no labels of their own.

``bias.json`` holds the towers' fingerprint, the prompts, the thresholds and the figures; ``bias.safetensors`` holds
the gender direction, the LEACE erasers and, by dictionary, mean activations and the association with gender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from services.bias.associate import Association
from services.bias.leace import Leace
from services.calibration_files import read_files, write_files
from services.modality.modalities import Modality

CONFIG_KEYS = {"tower_fingerprint", "prompts", "thresholds", "dictionaries", "figures"}
_ASSOCIATION = ("value", "low", "high", "share")
_LEACE = ("u", "v", "mean")


@dataclass(frozen=True)
class ModalityCalibration:
    """What is known of one dictionary in one modality.

    Attributes
    ----------
    means : float32 array, shape (n,)
        Mean activation over the corpus.
    association : Association
        With gender.
    """

    means: Float[np.ndarray, " n"]
    association: Association


@dataclass(frozen=True)
class DictionaryCalibration:
    """What is known of one dictionary in both modalities.

    Attributes
    ----------
    rank : int32 array, shape (n,)
        Features, most associated with gender first.
    sides : mapping of Modality to ModalityCalibration
        Both modalities.
    """

    rank: Int[np.ndarray, " n"]
    sides: Mapping[Modality, ModalityCalibration]


@dataclass(frozen=True)
class BiasCalibration:
    """Everything that a bundle's ``bias/`` holds.

    Attributes
    ----------
    tower_fingerprint : str
        Of the towers that it was made on.
    prompts : mapping of str to tuple of str
        Texts of "woman" and of "man".
    direction : float32 array, shape (d,)
        t_F - t_M of the prompts.
    thresholds : mapping of Modality to float
        Scores at which both genders are recognised best, on validation data.
    leace : mapping of Modality to Leace
        Erasers.
    dictionaries : mapping of str to DictionaryCalibration
        By name.
    metrics : mapping
        What the study measured, as JSON values.
    """

    tower_fingerprint: str
    prompts: Mapping[str, tuple[str, ...]]
    direction: Float[np.ndarray, " d"]
    thresholds: Mapping[Modality, float]
    leace: Mapping[Modality, Leace]
    dictionaries: Mapping[str, DictionaryCalibration]
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Path, weights: Path) -> BiasCalibration:
        """Read what `write` wrote.

        Raises
        ------
        ManifestError
            Where a file does not hold what it should.
        """
        with read_files(config, weights, CONFIG_KEYS, "a bias calibration") as (document, tensors):
            return cls(
                tower_fingerprint=str(document["tower_fingerprint"]),
                prompts={who: tuple(texts) for who, texts in document["prompts"].items()},
                direction=tensors["direction"],
                thresholds={m: float(document["thresholds"][m.value]) for m in Modality},
                leace={m: Leace(*(tensors[f"leace.{m.value}.{part}"] for part in _LEACE)) for m in Modality},
                dictionaries={name: _dictionary(name, tensors) for name in document["dictionaries"]},
                metrics=document["figures"],
            )

    def write(self, config: Path, weights: Path) -> None:
        """Write both files."""
        tensors: dict[str, NDArray[Any]] = {"direction": self.direction}
        for modality, eraser in self.leace.items():
            tensors |= {f"leace.{modality.value}.{part}": getattr(eraser, part) for part in _LEACE}
        for name, dictionary in self.dictionaries.items():
            tensors[f"{name}.rank"] = dictionary.rank.astype(np.int32)
            for modality, side in dictionary.sides.items():
                key = f"{name}.{modality.value}"
                tensors[f"{key}.means"] = side.means
                for part in _ASSOCIATION:
                    tensors[f"{key}.{part}"] = getattr(side.association, part).astype(np.float32)
        document = {
            "tower_fingerprint": self.tower_fingerprint,
            "prompts": {who: list(texts) for who, texts in self.prompts.items()},
            "thresholds": {modality.value: value for modality, value in self.thresholds.items()},
            "dictionaries": sorted(self.dictionaries),
            "figures": dict(self.metrics),
        }
        write_files(config, weights, document, tensors)


def _dictionary(name: str, tensors: Mapping[str, NDArray[Any]]) -> DictionaryCalibration:
    sides = {}
    for modality in Modality:
        key = f"{name}.{modality.value}"
        parts = (tensors[f"{key}.{part}"].astype(np.float64) for part in _ASSOCIATION)
        sides[modality] = ModalityCalibration(tensors[f"{key}.means"], Association(*parts))
    return DictionaryCalibration(tensors[f"{name}.rank"], sides)
