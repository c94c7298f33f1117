"""Verdicts on images, and what filtering makes of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from monofacet._types.brief import Brief
from monofacet._types.encoding import Floats, Timings
from monofacet._types.modality import ModalityLabel

__all__ = [
    "DetectionScores",
    "FilterMode",
    "FilterResult",
    "FilteredImage",
    "SuspiciousFeature",
    "SuspicionReason",
    "Verdict",
    "ZeroShotLabel",
]


class Verdict(enum.StrEnum):
    """What the detector says of an image. CLEAN does not say that it is harmless."""

    CLEAN = "CLEAN"
    ADVERSARIAL = "ADVERSARIAL"


class FilterMode(enum.StrEnum):
    """What becomes of suspicious features.

    DROP sets to zero what attacks move, TEXT features and unstable ones; KEEP_NORMAL what clean images do not have;
    RESTORE takes the activations of the smoothed picture, and needs a second look.
    """

    DROP = "DROP"
    KEEP_NORMAL = "KEEP_NORMAL"
    RESTORE = "RESTORE"


class SuspicionReason(enum.StrEnum):
    """Why a feature is suspicious.

    UNSEEN on clean images, EXCESS over what they have, MOVED by known attacks, TEXT on an image, or UNSTABLE when the
    picture is smoothed.
    """

    UNSEEN = "UNSEEN"
    EXCESS = "EXCESS"
    MOVED = "MOVED"
    TEXT = "TEXT"
    UNSTABLE = "UNSTABLE"


@dataclass(frozen=True, slots=True, repr=False)
class DetectionScores(Brief):
    """What a verdict is made of; larger is more suspicious.

    Attributes
    ----------
    reconstruction_error
        Distance of the embedding from its reconstruction, in [0, 2].
    text_share, moved_share
        Shares of the energy on TEXT features and on those that attacks move, in [0, 1].
    noise
        How much colour alternates from pixel to pixel in the picture's quiet quarter, in pixel levels, 0 to 510.
    instability
        1 - cosine of the embeddings of the picture and of the smoothed picture, in [0, 2]; None without a second look.
    """

    reconstruction_error: float
    text_share: float
    moved_share: float
    noise: float
    instability: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class SuspiciousFeature(Brief):
    """A suspicious feature of an image.

    Attributes
    ----------
    feature, label, name
        Which one; the label is None if it has none.
    activation, filtered
        As encoded, and as the filtered embedding is made of.
    reasons
        Why; at least one.
    """

    feature: int
    activation: float
    filtered: float
    reasons: tuple[SuspicionReason, ...]
    label: ModalityLabel | None
    name: str


@dataclass(frozen=True, slots=True, repr=False)
class ZeroShotLabel(Brief):
    """The text that an embedding is nearest to.

    Attributes
    ----------
    text, index
        The text, and its place among the labels.
    probability
        Softmax over the labels, in [0, 1].
    similarity
        Cosine, in [-1, 1].
    """

    text: str
    index: int
    probability: float
    similarity: float


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class FilteredImage(Brief):
    """What was found of one image.

    Attributes
    ----------
    verdict
        At the server's operating point.
    score, threshold
        Probability of an attack at even odds, and from where on the verdict is ADVERSARIAL; both in [0, 1].
    p_value
        Share of clean calibration images that score at least this high, in (0, 1].
    scores
        What the score is made of.
    features
        Suspicious features, largest change first; not all of them if `suspicious_features` is more.
    suspicious_features
        How many there are.
    filtered
        Whether the embedding was filtered.
    before, after
        The embedding as encoded and filtered, float32, shape [embed_dim], of length 1.
    label_before, label_after
        The nearest label of each.
    """

    verdict: Verdict
    score: float
    threshold: float
    p_value: float
    scores: DetectionScores
    features: tuple[SuspiciousFeature, ...]
    suspicious_features: int
    filtered: bool
    before: Floats
    after: Floats
    label_before: ZeroShotLabel
    label_after: ZeroShotLabel

    @property
    def adversarial(self) -> bool:
        """Whether the verdict is ADVERSARIAL."""
        return self.verdict is Verdict.ADVERSARIAL


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class FilterResult(Brief):
    """The verdicts on a batch, in the order of the images.

    Attributes
    ----------
    images
        One an image.
    false_positive_rate
        The server's operating point: the share of clean images that it lets be called ADVERSARIAL.
    mode, keep_residual
        How suspicious features were filtered.
    dictionary, bundle
        What the features belong to.
    timings
        The longest queueing and the sum of inference over the calls that it took.
    """

    images: tuple[FilteredImage, ...]
    false_positive_rate: float
    mode: FilterMode
    keep_residual: bool
    dictionary: str
    timings: Timings
    bundle: str

    def __len__(self) -> int:
        return len(self.images)
