"""Doses and attributes: how far an edit goes as the generator sees it, and directions that people want to turn.

An embedding fills few of its dimensions, so ||delta e|| says little of what a generator that equalises them sees. The
dose of a change from e to e', both unnormalised, is

    ||(e' - e) W||,    W = (M + lambda I)^-1/2 / c,    M = E[e^T e]

over the embeddings that the generator was conditioned on; c scales W so that their root mean square length is 1.

An attribute is a sparse change of activations, fitted between drawings of one concept that differ in it. Both come
from ``attributes/`` of a bundle, which ``python -m training.imaging.attributes`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int
from numpy.typing import NDArray

from services.errors import BundleFileError, UnknownAttribute
from services.strict_json import parse_dataclass
from services.weights import open_weights

CONFIG, WEIGHTS = "attributes.json", "attributes.safetensors"
# A quantile is lengthened at most so many times: far past it the feature means something else.
MAX_GAIN = 6.0
# A change towards a reference may be lengthened so far past the reference's activations to reach a dose.
MAX_OVERSHOOT = 1.25


@dataclass(frozen=True)
class Share:
    """A share of pictures with its 95% interval, all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AttributeMeasures:
    """What an attribute does at strength 1, measured on concepts that chose nothing.

    Attributes
    ----------
    pictures : int
        Steered pictures.
    hit : Share
        Of them, those in which a probe, fitted on other drawings, finds the attribute.
    hit_before : Share
        The same of their unsteered images.
    kept : Share
        Of those whose unsteered image the judge takes for its concept rather than for others (in grey, where the
        attribute is a colour): those that it still does.
    kept_before : Share
        Unsteered images that it does.
    off_distribution, off_distribution_before : float
        Mean share of held-out embeddings that lie nearer to the training data than the steered, or unsteered,
        embedding: 0.5 is as usual, 1 farther out than all.
    """

    pictures: int
    hit: Share
    hit_before: Share
    kept: Share
    kept_before: Share
    off_distribution: float
    off_distribution_before: float


@dataclass(frozen=True)
class AttributeEntry:
    """What ``attributes.json`` says of one attribute.

    Attributes
    ----------
    name : str
        What callers name it by, such as ``dark skin``.
    group : str
        What it is one value of, such as ``skin tone``.
    dose : float
        Of strength 1, before activations are kept at or above 0.
    pairs : int
        Pairs of drawings of one concept that it was fitted on.
    concepts : int
        Concepts among them.
    measures : AttributeMeasures or None
        None where it was not measured.
    """

    name: str
    group: str
    dose: float
    pairs: int
    concepts: int
    measures: AttributeMeasures | None = None


@dataclass(frozen=True)
class AttributesConfig:
    """``attributes.json``.

    Attributes
    ----------
    tower_fingerprint : str
        Of the towers.
    dictionary : str
        Whose features the attributes are made of.
    unit : float
        Dose that an edit to a quantile is lengthened to at strength 1.
    fade : float
        Dose of edits at which the prompt's words no longer count, so that they do not hold the picture in place; 0
        keeps them. Attributes leave them.
    evidence : mapping
        How unit and fade were chosen.
    attributes : tuple of AttributeEntry
        In order of the tensors.
    """

    tower_fingerprint: str
    dictionary: str
    unit: float
    fade: float
    evidence: Mapping[str, Any]
    attributes: tuple[AttributeEntry, ...] = ()


@dataclass(frozen=True)
class Attribute:
    """An attribute with its change of activations: float32 `values` of the features `ids`, shape (k,)."""

    entry: AttributeEntry
    ids: Int[NDArray[np.int64], " k"]
    values: Float[NDArray[np.float32], " k"]


@dataclass(frozen=True)
class Attributes:
    """What a bundle knows of doses and attributes.

    Attributes
    ----------
    config : AttributesConfig
        Numbers.
    whitening : float32 array, shape (d, d)
        W.
    attributes : dict of str to Attribute
        By name, in order.
    """

    config: AttributesConfig
    whitening: Float[NDArray[np.float32], "d d"]
    attributes: dict[str, Attribute]

    def dose(self, change: Float[NDArray[np.float64], " d"]) -> float:
        """Return the dose of a change of an unnormalised embedding."""
        return float(np.linalg.norm(change @ self.whitening))

    def attribute(self, name: str, dictionary: str) -> Attribute:
        """Return an attribute of `dictionary` by its name.

        Raises
        ------
        UnknownAttribute
            Blaming ``name``.
        """
        if name not in self.attributes:
            message = f"no attribute {name!r}; there are {', '.join(self.attributes) or 'none'}"
            raise UnknownAttribute(message, [("name", message)])
        if dictionary != self.config.dictionary:
            message = f"attributes are made of features of {self.config.dictionary!r}, not of {dictionary!r}"
            raise UnknownAttribute(message, [("name", message)])
        return self.attributes[name]

    def write(self, folder: Path) -> None:
        """Write ``attributes.json`` and ``attributes.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        several = list(self.attributes.values())
        empty = np.zeros(0)
        tensors = {
            "whitening": self.whitening.astype(np.float32),
            "lengths": np.array([len(a.ids) for a in several], np.int32),
            "ids": np.concatenate([empty, *(a.ids for a in several)]).astype(np.int32),
            "values": np.concatenate([empty, *(a.values for a in several)]).astype(np.float32),
        }
        safetensors.numpy.save_file(tensors, str(folder / WEIGHTS))
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Attributes:
        """Read what `write` wrote.

        Raises
        ------
        BundleFileError
            Where it is something else.
        """
        try:
            document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            with open_weights(folder / WEIGHTS) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whitening, lengths, values = tensors["whitening"], tensors["lengths"], tensors["values"]
            ids = tensors["ids"].astype(np.int64)
        except (OSError, ValueError, KeyError) as error:
            raise BundleFileError(f"{CONFIG} and {WEIGHTS} hold no attributes") from error
        config = parse_dataclass(AttributesConfig, document, "attributes")
        if len(lengths) != len(config.attributes) or len(ids) != len(values) or lengths.sum() != len(ids):
            raise BundleFileError(f"{WEIGHTS} and {CONFIG} differ in their attributes")
        ends = np.cumsum(lengths)
        return cls(
            config,
            whitening,
            {
                entry.name: Attribute(entry, ids[end - n : end], values[end - n : end])
                for entry, n, end in zip(config.attributes, lengths, ends, strict=True)
            },
        )


def whitening_of(embeddings: Float[NDArray[np.float32], "n d"], shrink: float = 0.01) -> NDArray[np.float32]:
    """Return W, float32, shape (d, d), over unnormalised embeddings.

    Shrinkage, a share of the mean eigenvalue without the largest, keeps directions of mere noise from being blown up.
    """
    e = embeddings.astype(np.float64)
    values, vectors = np.linalg.eigh(e.T @ e / len(e))
    floor = shrink * (values.sum() - values.max()) / len(values)
    w = (vectors * (values.clip(0) + floor) ** -0.5) @ vectors.T
    scale = np.sqrt(np.square(e @ w).sum(1).mean())
    white: NDArray[np.float32] = (w / scale).astype(np.float32)
    return white
