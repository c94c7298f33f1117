"""The bundle's ``defense/``: what a study learnt of attacks on the towers and of clean images.

``defense.json`` holds the towers' fingerprint, the dictionary, the detectors, how to filter, the labels, and the
figures; ``defense.safetensors`` holds what has a row a feature, an image or a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from services.calibration_files import read_files, write_files
from services.defense.detector import Detector
from services.defense.features import FeatureStatistics
from services.defense.filtering import FilterChoice, FilterMode
from services.defense.scores import ONE_LOOK, SIGMA, TWO_LOOKS
from services.errors import ManifestError

CONFIG_KEYS = {
    "tower_fingerprint", "dictionary", "sigma", "tolerance", "detectors", "choices", "labels", "figures",
}  # fmt: skip
# Whether there is a second look, and its name on disk.
LOOKS = {False: "one_look", True: "two_looks"}
_NAMES = {False: ONE_LOOK, True: TWO_LOOKS}
_VECTORS = ("floor", "mean", "scale", "weight")


@dataclass(frozen=True)
class DefenseCalibration:
    """Everything that a bundle's ``defense/`` holds.

    Attributes
    ----------
    tower_fingerprint : str
        Of the towers that it was made on.
    dictionary : str
        The dictionary whose features are judged.
    statistics : FeatureStatistics
        Of that dictionary.
    detectors, choices : mapping of bool to Detector, FilterChoice
        Without and with a second look.
    labels : tuple of str
        For zero-shot labels.
    label_units : float32 array, shape (labels, d)
        Their unit embeddings.
    metrics : mapping
        What the study measured, as JSON values.
    """

    tower_fingerprint: str
    dictionary: str
    statistics: FeatureStatistics
    detectors: Mapping[bool, Detector]
    choices: Mapping[bool, FilterChoice]
    labels: tuple[str, ...]
    label_units: Float[np.ndarray, "labels d"]
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Path, weights: Path) -> DefenseCalibration:
        """Read what `write` wrote.

        Raises
        ------
        ManifestError
            Where a file does not hold what it should.
        """
        with read_files(config, weights, CONFIG_KEYS, "a defense calibration") as (document, tensors):
            if document["sigma"] != SIGMA:
                # Its thresholds would be of another detector.
                raise ManifestError(
                    f"{config.name} was calibrated with another smoothing: {document['sigma']}"
                )
            units = tensors["label_units"].astype(np.float32)
            labels = tuple(document["labels"])
            if len(labels) != len(units):
                raise ManifestError(f"{config.name}: {len(labels)} labels for {len(units)} embeddings")
            return cls(
                tower_fingerprint=str(document["tower_fingerprint"]),
                dictionary=str(document["dictionary"]),
                statistics=FeatureStatistics(
                    tensors["firing_rate"],
                    tensors["upper"],
                    tensors["moved"].astype(bool),
                    tensors["text"].astype(bool),
                    float(document["tolerance"]),
                ),
                detectors={
                    twice: _detector(twice, document["detectors"][name], tensors)
                    for twice, name in LOOKS.items()
                },
                choices={twice: _choice(document["choices"][name]) for twice, name in LOOKS.items()},
                labels=labels,
                # Half floats round lengths.
                label_units=units / np.linalg.norm(units, axis=1, keepdims=True),
                metrics=document["figures"],
            )

    def write(self, config: Path, weights: Path) -> None:
        """Write both files."""
        statistics = self.statistics
        tensors: dict[str, NDArray[Any]] = {
            "firing_rate": statistics.firing_rate,
            "upper": statistics.upper,
            "moved": statistics.moved.astype(np.uint8),
            "text": statistics.text.astype(np.uint8),
            "label_units": self.label_units.astype(np.float16),
        } | {f"clean.{name}": self.detectors[twice].clean for twice, name in LOOKS.items()}
        document = {
            "tower_fingerprint": self.tower_fingerprint,
            "dictionary": self.dictionary,
            "sigma": SIGMA,
            "tolerance": statistics.tolerance,
            "detectors": {
                name: {
                    "bias": self.detectors[twice].bias,
                    **{part: getattr(self.detectors[twice], part).tolist() for part in _VECTORS},
                }
                for twice, name in LOOKS.items()
            },
            "choices": {
                name: {
                    "mode": self.choices[twice].mode.value,
                    "keep_residual": self.choices[twice].keep_residual,
                }
                for twice, name in LOOKS.items()
            },
            "labels": list(self.labels),
            "figures": dict(self.metrics),
        }
        write_files(config, weights, document, tensors)


def _detector(twice: bool, parts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Detector:
    names = _NAMES[twice]
    vectors = {part: np.array(parts[part], np.float64) for part in _VECTORS}
    if any(vector.shape != (len(names),) for vector in vectors.values()):
        raise ManifestError(
            f"the detector of {LOOKS[twice]} must have {len(names)} weights: {', '.join(names)}"
        )
    return Detector(names, **vectors, bias=float(parts["bias"]), clean=tensors[f"clean.{LOOKS[twice]}"])


def _choice(parts: Mapping[str, Any]) -> FilterChoice:
    return FilterChoice(FilterMode(parts["mode"]), bool(parts["keep_residual"]))
