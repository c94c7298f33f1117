"""From a bundle to what edits need of its dictionaries; no torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from services.bundle.load import Bundle
from services.imaging.statistics import ActivationStatistics
from services.imaging.steering import FeatureSpace
from services.modality.modalities import Modality


def feature_space(bundle: Bundle, name: str, rows: Callable[[Modality], NDArray[np.float32]]) -> FeatureSpace:
    """Return what edits need of a dictionary of `bundle`, whose decoder is `rows`."""
    manifest = bundle.manifest
    return FeatureSpace(
        name,
        manifest.dictionaries[name].n_features,
        manifest.dictionaries[name].kind == "neurons",
        rows,
        bundle.modality(name) if name in manifest.modality else None,
        ActivationStatistics.read(bundle.path / manifest.steering[name])
        if name in manifest.steering
        else None,
        bundle.attributes(),
    )
