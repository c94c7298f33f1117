"""The tiny bundle with a bias calibration of random directions: numbers that mean nothing and are stable."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from services.bias.associate import Association
from services.bias.calibration import BiasCalibration, DictionaryCalibration, ModalityCalibration
from services.bias.leace import Leace
from services.bundle.load import BIAS, Bundle, refresh_manifest
from services.modality.modalities import Modality

THRESHOLDS = {Modality.IMAGE: 0.05, Modality.TEXT: -0.02}


def with_bias(
    bundle: Bundle,
    path: Path,
    seed: int = 0,
    metrics: Mapping[str, Any] = MappingProxyType({"chosen": "nothing"}),
) -> Bundle:
    """Copy `bundle` to `path`, add the calibration, and load it."""
    shutil.copytree(bundle.path, path)
    write_bias(bundle, path, seed, metrics)
    refresh_manifest(path)
    return Bundle.load(path)


def write_bias(
    bundle: Bundle,
    path: Path,
    seed: int = 0,
    metrics: Mapping[str, Any] = MappingProxyType({"chosen": "nothing"}),
) -> None:
    """Write a calibration for `bundle` into the bundle folder `path`, whose manifest does not know of it yet."""
    rng = np.random.default_rng(seed)
    d = bundle.clip_config.embed_dim

    def vector(n: int) -> np.ndarray:
        return rng.normal(size=n).astype(np.float32)

    def dictionary(n: int) -> DictionaryCalibration:
        sides = {}
        for modality in Modality:
            value = rng.uniform(-1, 1, n)
            association = Association(value, value - 0.1, value + 0.1, rng.uniform(0, 1 / n, n))
            sides[modality] = ModalityCalibration(np.abs(vector(n)) * 0.1, association)
        return DictionaryCalibration(rng.permutation(n).astype(np.int32), sides)

    BiasCalibration(
        tower_fingerprint=bundle.manifest.clip.fingerprint,
        prompts={"woman": ("a woman",), "man": ("a man",)},
        direction=vector(d) * 0.3,
        thresholds=THRESHOLDS,
        leace={m: Leace(vector(d) * 0.3, vector(d) * 0.3, vector(d) * 0.1) for m in Modality},
        # One dictionary is left out: a bundle may have more than were studied.
        dictionaries={
            name: dictionary(entry.n_features)
            for name, entry in bundle.manifest.dictionaries.items()
            if name != "ncl"
        },
        metrics=metrics,
    ).write(path / BIAS / f"{BIAS}.json", path / BIAS / f"{BIAS}.safetensors")
