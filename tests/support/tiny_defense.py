"""A defense calibration for the tiny bundle: the noise of a picture alone decides, and is easy to foresee."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from services.bundle.load import DEFENSE, Bundle, refresh_manifest
from services.defense import DefenseCalibration, Detector, FeatureStatistics, FilterChoice, FilterMode
from services.defense.scores import ONE_LOOK, TWO_LOOKS

LABELS = ("a red circle", "a green square", "a blue triangle")
# Clean pictures have a noise of at most this many pixel levels; a picture with more is called adversarial.
CLEAN_NOISE = 0.5


def with_defense(tiny: Bundle, folder: Path) -> Bundle:
    """Copy `tiny` to `folder` with a calibration of its default dictionary."""
    shutil.copytree(tiny.path, folder)
    tiny_calibration(tiny).write(folder / DEFENSE / "defense.json", folder / DEFENSE / "defense.safetensors")
    refresh_manifest(folder)
    return Bundle.load(folder)


def tiny_calibration(tiny: Bundle) -> DefenseCalibration:
    n = tiny.manifest.dictionaries["sae"].n_features
    rng = np.random.default_rng(0)
    units = rng.standard_normal((len(LABELS), tiny.clip_config.embed_dim)).astype(np.float32)
    return DefenseCalibration(
        tower_fingerprint=tiny.manifest.clip.fingerprint,
        dictionary="sae",
        statistics=FeatureStatistics(
            firing_rate=rng.uniform(0, 1, n).astype(np.float32),
            upper=np.full(n, 0.4, np.float32),
            moved=np.arange(n) % 4 == 0,
            text=tiny.modality("sae").label == "TEXT",
            tolerance=0.01,
        ),
        detectors={False: detector(ONE_LOOK), True: detector(TWO_LOOKS)},
        choices={False: FilterChoice(FilterMode.DROP, True), True: FilterChoice(FilterMode.RESTORE, False)},
        labels=LABELS,
        label_units=units / np.linalg.norm(units, axis=1, keepdims=True),
    )


def detector(names: tuple[str, ...]) -> Detector:
    k = len(names)
    clean = np.log(np.linspace(0, CLEAN_NOISE, 200) + 1)
    weight = np.array([float(name == "noise") for name in names])
    return Detector(names, np.ones(k), np.zeros(k), np.ones(k), weight, 0.0, clean)
