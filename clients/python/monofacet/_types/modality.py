"""Features and what they are about."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import PIL.Image

from monofacet._convert import wire, word
from monofacet._pictures import decode
from monofacet._types.brief import Brief
from monofacet._types.encoding import Timings
from monofacet.v1 import common_pb2

__all__ = [
    "ActiveFeature",
    "ClassificationResult",
    "FeatureCard",
    "FeatureDetail",
    "FeatureOrder",
    "FeaturePage",
    "FeatureQuery",
    "ImageExample",
    "ModalityClassification",
    "ModalityLabel",
    "ModalityTable",
    "ScoreSettings",
    "TextExample",
]

FeatureOrder = Literal[
    "feature",
    "mds",
    "coactivation",
    "firing_rate_image",
    "firing_rate_text",
    "energy_image",
    "energy_text",
    "name_auc",
    "emb_sim_image",
    "emb_sim_text",
    "name",
]


class ModalityLabel(enum.StrEnum):
    """What a feature is about."""

    IMAGE = "IMAGE"
    TEXT = "TEXT"
    CROSS = "CROSS"
    UNRESOLVED = "UNRESOLVED"
    DEAD = "DEAD"


class FeatureQuery(TypedDict, total=False):
    """Which features are listed, and in which order. All conditions must hold.

    Attributes
    ----------
    dictionary
        Its name; empty (the default) for the default one.
    labels
        Any of these. Default all.
    min_mds, max_mds
        Bounds of the energy MDS, in [0, 1].
    min_firing_rate, max_firing_rate
        Bounds of the larger of the two firing rates, in [0, 1].
    name_contains
        Part of the name, in any case.
    coactivation_significant
        True or False for features that are so. Default either.
    order_by, descending
        The order, by default by feature id. Features without the measure come last.
    """

    dictionary: str
    labels: Iterable[ModalityLabel | str]
    min_mds: float | None
    max_mds: float | None
    min_firing_rate: float | None
    max_firing_rate: float | None
    name_contains: str
    coactivation_significant: bool | None
    order_by: FeatureOrder
    descending: bool


@dataclass(frozen=True, slots=True, repr=False)
class FeatureCard(Brief):
    """What is known about one feature. A measure that is undefined is None.

    Attributes
    ----------
    feature
        Feature id.
    label
        By energy MDS, its interval, and co-activation.
    mds_energy, mds_energy_low, mds_energy_high
        Share of the feature's energy that comes from images, in [0, 1], and its 95% interval.
    mds_paper, paper_label, paper_pairs
        The paper's score in [0, 1], its label, and the pairs that the score averages.
    coactivation, coactivation_p, coactivation_q, coactivation_significant
        Correlation of the two sides over true pairs, in [-1, 1]; p-value; p-value adjusted for all features;
        verdict.
    firing_rate_image, firing_rate_text
        Shares of images and of texts that activate it, in [0, 1].
    energy_image, energy_text
        Mean squared activation relative to the average feature.
    name, name_npmi
        Phrase of captions that it detects best, empty if none well enough; its normalised PMI with it, in [-1, 1].
    name_auc, name_auc_low, name_auc_high, name_count
        How well it detects the phrase on held-out samples, in [0, 1], the 95% interval, and the independent samples
        with the phrase that this rests on. Where there is no name, of the best phrase that was tried.
    emb_sim_image, emb_sim_text, win_rate_image, win_rate_text
        Similarity among its top samples, in [-1, 1], and how often that beats random ones, in [0, 1].
    label_reason
        Why it has its label, in a sentence; empty from a server that does not say.
    """

    feature: int
    label: ModalityLabel
    mds_energy: float | None = None
    mds_energy_low: float | None = None
    mds_energy_high: float | None = None
    mds_paper: float | None = None
    paper_label: ModalityLabel | None = None
    paper_pairs: int = 0
    coactivation: float | None = None
    coactivation_p: float | None = None
    coactivation_q: float | None = None
    coactivation_significant: bool = False
    firing_rate_image: float = 0.0
    firing_rate_text: float = 0.0
    energy_image: float = 0.0
    energy_text: float = 0.0
    name: str = ""
    name_npmi: float | None = None
    name_auc: float | None = None
    emb_sim_image: float | None = None
    emb_sim_text: float | None = None
    win_rate_image: float | None = None
    win_rate_text: float | None = None
    name_auc_low: float | None = None
    name_auc_high: float | None = None
    name_count: int = 0
    label_reason: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class FeaturePage(Brief):
    """A page of features.

    Attributes
    ----------
    cards
        The features, in order.
    total
        Features that pass the filter, over all pages.
    next_page_token
        For the next page; empty on the last one.
    dictionary, bundle
        What the features belong to.
    """

    cards: tuple[FeatureCard, ...]
    total: int
    next_page_token: str
    dictionary: str
    bundle: str


def _thumbnail(message: Any) -> PIL.Image.Image | None:
    if not message.HasField("thumbnail"):
        return None
    return decode(message.thumbnail.data, f"the thumbnail of {message.sample!r}")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ImageExample(Brief):
    """An image that activates a feature.

    Attributes
    ----------
    image
        A small picture of it, or None.
    caption, sample
        Its caption, and its id in the corpus.
    activation
        The feature's activation on it.
    """

    image: PIL.Image.Image | None = field(metadata=wire(_thumbnail))
    caption: str
    sample: str
    activation: float


@dataclass(frozen=True, slots=True, repr=False)
class TextExample(Brief):
    """A text that activates a feature.

    Attributes
    ----------
    text, sample
        The text, and its id in the corpus.
    activation
        The feature's activation on it.
    """

    text: str
    sample: str
    activation: float


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class FeatureDetail(Brief):
    """One feature with what activates it most.

    Attributes
    ----------
    card
        What is known about it.
    images, texts
        Strongest first.
    dictionary, bundle
        What it belongs to.
    """

    card: FeatureCard
    images: tuple[ImageExample, ...]
    texts: tuple[TextExample, ...]
    dictionary: str
    bundle: str


@dataclass(frozen=True, slots=True, repr=False)
class ActiveFeature(Brief):
    """A feature that an input activates.

    Attributes
    ----------
    feature, label, name
        Which one.
    activation
        No unit.
    share
        Of the input's energy, in [0, 1].
    """

    feature: int
    activation: float
    share: float
    label: ModalityLabel
    name: str


_label = word(ModalityLabel, common_pb2.ModalityLabel.DESCRIPTOR)


def _shares(message: Any) -> dict[ModalityLabel, float]:
    return dict.fromkeys(ModalityLabel, 0.0) | {_label(item.label): item.share for item in message.shares}


@dataclass(frozen=True, slots=True, repr=False)
class ModalityClassification(Brief):
    """How the energy of one input is spread.

    Attributes
    ----------
    shares
        Share of each label, in [0, 1], adding up to 1, or all 0 if the input activates nothing.
    dominant_label
        The label with the largest share; None if the input activates nothing.
    top_features
        Strongest first.
    active_features
        How many features it activates.
    """

    shares: dict[ModalityLabel, float] = field(metadata=wire(_shares))
    dominant_label: ModalityLabel | None
    top_features: tuple[ActiveFeature, ...]
    active_features: int


@dataclass(frozen=True, slots=True, repr=False)
class ClassificationResult(Brief):
    """The classifications of a batch, in the order of the inputs.

    Attributes
    ----------
    classifications
        One an input.
    dictionary, bundle
        What they belong to.
    timings
        The longest queueing and the sum of inference over the calls that it took.
    """

    classifications: tuple[ModalityClassification, ...]
    dictionary: str
    timings: Timings
    bundle: str

    def __len__(self) -> int:
        return len(self.classifications)


@dataclass(frozen=True, slots=True, repr=False)
class ScoreSettings(Brief):
    """How pairs are scored. What is None takes the server's default; a table's own settings have no None.

    Attributes
    ----------
    dictionary
        Its name; empty is the default one.
    delta
        Half the width of the band around 0.5 that counts as both, in (0, 0.5). Default 0.25.
    bootstrap_samples, shuffles
        For intervals and p-values, 100 to 10,000. Default 1,000.
    false_discovery_rate
        Of co-activation over all features, in (0, 1). Default 0.05.
    seed
        Same pairs, settings and seed, same table. Default 0.
    truncate_text
        Cut long texts instead of refusing them.
    """

    dictionary: str = ""
    delta: float | None = None
    bootstrap_samples: int | None = None
    shuffles: int | None = None
    false_discovery_rate: float | None = None
    seed: int | None = None
    truncate_text: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class ModalityTable(Brief):
    """The features of a dictionary, scored on the caller's pairs.

    Attributes
    ----------
    cards
        One a feature, by feature id.
    pairs
        How many pairs were scored.
    settings
        As used.
    timings, bundle
        Where the time went, and the bundle that answered.
    """

    cards: tuple[FeatureCard, ...]
    pairs: int
    settings: ScoreSettings
    timings: Timings
    bundle: str

    def counts(self) -> dict[ModalityLabel, int]:
        """Count the labels.

        Returns
        -------
        dict
            Features of each label, all five labels present.
        """
        counts = dict.fromkeys(ModalityLabel, 0)
        for card in self.cards:
            counts[card.label] += 1
        return counts

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Take one number of every card.

        Parameters
        ----------
        name
            A numeric attribute of `FeatureCard`, such as ``mds_energy``.

        Returns
        -------
        ndarray of float64, shape [features]
            NaN where it is undefined.
        """
        values = [getattr(card, name) for card in self.cards]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
