"""What edits need of a bundle's dictionaries. Only `Features`, which reads the dictionaries themselves, loads torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.bundle.load import Bundle
from services.errors import UnknownDictionary
from services.imaging.dose import Attributes
from services.imaging.statistics import ActivationStatistics
from services.imaging.steering import FeatureSpace
from services.modality.modalities import Modality

if TYPE_CHECKING:
    from services.dictionaries.base import Dictionary


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


class Features:
    """A bundle's dictionaries with their feature spaces, each read when it is first asked for: few of them are.

    Parameters
    ----------
    bundle : Bundle
        Already verified.

    Attributes
    ----------
    tower_fingerprint : str
        Of the towers on whose embeddings they were trained.
    embed_dim : int
        d of those embeddings.
    attributes : Attributes or None
        Doses and attributes, if the bundle has them.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.tower_fingerprint: str = bundle.manifest.clip.fingerprint
        self.embed_dim: int = bundle.clip_config.embed_dim
        self.attributes: Attributes | None = bundle.attributes()
        self._read: dict[str, tuple[Dictionary, FeatureSpace]] = {}
        self._reading = threading.Lock()

    def of(self, name: str) -> tuple[Dictionary, FeatureSpace]:
        """Return a dictionary and its space; the default one where `name` is empty.

        Raises
        ------
        UnknownDictionary
            Blaming ``steering.dictionary``.
        """
        manifest = self._bundle.manifest
        name = name or manifest.default_dictionary
        if name not in manifest.dictionaries:
            raise UnknownDictionary.named(name, manifest.dictionaries, "steering.dictionary")
        with self._reading:
            if name not in self._read:
                dictionary = self._bundle.dictionary(name)
                self._read[name] = dictionary, feature_space(self._bundle, name, _rows(dictionary))
            return self._read[name]

    def know(self, attributes: Attributes | None) -> None:
        """Steer by these doses and attributes from now on: for a study that has not written them yet."""
        with self._reading:
            self.attributes = attributes
            self._read = {
                name: (dictionary, replace(space, attributes=attributes))
                for name, (dictionary, space) in self._read.items()
            }


def _rows(dictionary: Dictionary) -> Callable[[Modality], NDArray[np.float32]]:
    def rows(modality: Modality) -> NDArray[np.float32]:
        decoder: NDArray[np.float32] = dictionary.decoder_rows(modality).detach().float().numpy()
        return decoder

    return rows
