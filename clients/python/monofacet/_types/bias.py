"""Gender scores, ablations and their audits."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monofacet._convert import wire
from monofacet._types.brief import Brief
from monofacet._types.encoding import Floats, Timings
from monofacet._types.modality import ModalityLabel
from monofacet.v1 import bias_service_pb2

__all__ = [
    "Ablation",
    "AblationAudit",
    "AblationMode",
    "AuditResult",
    "AuditSettings",
    "AuditVerdict",
    "Change",
    "Estimate",
    "Gender",
    "GenderClassification",
    "GenderMeasures",
    "GenderResult",
    "GenderScore",
    "NullTest",
    "ProfessionAudit",
    "SkippedItem",
]


class AblationMode(enum.StrEnum):
    """What becomes of the ablated features."""

    ZERO = "ZERO"
    MEAN = "MEAN"
    PROJECT = "PROJECT"
    LEACE = "LEACE"


class Gender(enum.StrEnum):
    """How a person is presented, in the two classes that the method knows."""

    WOMAN = "WOMAN"
    MAN = "MAN"


class AuditVerdict(enum.StrEnum):
    """What an audit comes to."""

    NO_EFFECT = "NO_EFFECT"
    THRESHOLD_ONLY = "THRESHOLD_ONLY"
    NOT_SPECIFIC = "NOT_SPECIFIC"
    SILENCED = "SILENCED"
    EFFECT = "EFFECT"


@dataclass(frozen=True, slots=True, repr=False)
class Ablation(Brief):
    """Which features are removed from an embedding, and how. One of the first three is set, except with LEACE.

    Attributes
    ----------
    features
        Feature ids.
    label
        All features of a label: IMAGE, TEXT or CROSS.
    top_gender_features
        So many features, those most associated with gender in the bundle's corpus.
    mode
        ZERO, MEAN or PROJECT; or LEACE, a reference that uses no features.
    dictionary
        Its name; empty for the default one.
    """

    features: Sequence[int] | None = field(
        default=None,
        metadata=wire(lambda message: tuple(message.features.ids) if message.HasField("features") else None),
    )
    label: ModalityLabel | str | None = None
    top_gender_features: int | None = None
    mode: AblationMode | str = AblationMode.ZERO
    dictionary: str = ""

    def __str__(self) -> str:
        if self.features is not None:
            what = f"{len(self.features)} features"
        elif self.label is not None:
            what = f"all {self.label}"
        elif self.top_gender_features is not None:
            what = f"top {self.top_gender_features}"
        else:
            return str(self.mode)
        return f"{what}, {self.mode}"


@dataclass(frozen=True, slots=True, repr=False)
class GenderScore(Brief):
    """The gender score of one embedding.

    Attributes
    ----------
    score
        Above 0 towards woman, in [-2, 2].
    p_woman
        Its probability, in [0, 1]; a man has 1 minus this.
    p_woman_calibrated
        The same at the bundle's threshold, where both genders were recognised best on its validation data.
    """

    score: float
    p_woman: float
    p_woman_calibrated: float


@dataclass(frozen=True, slots=True, repr=False)
class GenderClassification(Brief):
    """How gendered one input is.

    Attributes
    ----------
    before, after
        As encoded, and after the ablation; None if none was asked for.
    kept
        Cosine of the embeddings before and after; None without an ablation.
    ablated_features
        Features of the ablated set that the input activates.
    """

    before: GenderScore
    after: GenderScore | None
    kept: float | None
    ablated_features: int


@dataclass(frozen=True, slots=True, repr=False)
class GenderResult(Brief):
    """The classifications of a batch, in the order of the inputs.

    Attributes
    ----------
    classifications
        One an input.
    ablation, set_size
        As used, and how many features it removes; None and 0 if none was asked for.
    timings
        The longest queueing and the sum of inference over the calls that it took.
    bundle
        The bundle that answered.
    """

    classifications: tuple[GenderClassification, ...]
    ablation: Ablation | None
    set_size: int
    timings: Timings
    bundle: str

    def __len__(self) -> int:
        return len(self.classifications)


@dataclass(frozen=True, slots=True, repr=False)
class AuditSettings(Brief):
    """How ablations are audited. What is None takes the server's default; a result's own settings have no None.

    Attributes
    ----------
    ablations
        1 to 8, all of one dictionary. Default the bundle's own choice (`Model.recommended_ablation`), or, where it
        has none, the 16 features most associated with gender.
    skip_bad_items
        Leave bad items out and name them, instead of failing. Default False.
    bootstrap_samples, null_sets
        For intervals and for the matched null, 100 to 10,000. Default 1,000.
    min_group
        Items of a gender that a profession needs to count in gaps. Default 5.
    seed
        Same items, settings and seed, same audit. Default 0.
    truncate_text
        Cut long texts instead of refusing them.
    """

    ablations: Sequence[Ablation] = ()
    skip_bad_items: bool = field(
        default=False,
        metadata=wire(lambda message: message.on_bad_item == bias_service_pb2.BAD_ITEM_POLICY_SKIP),
    )
    bootstrap_samples: int | None = None
    null_sets: int | None = None
    min_group: int | None = None
    seed: int | None = None
    truncate_text: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Estimate(Brief):
    """A figure with its 95% bootstrap interval over clusters; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, repr=False)
class Change(Brief):
    """A figure before and after an ablation, and the paired difference, after minus before.

    Attributes
    ----------
    before_by_chance, after_by_chance
        Of a figure over professions, its mean where professions are dealt anew among the items of each gender: the
        largest of many gaps is large by chance alone. None for other figures.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    before_by_chance: float | None = None
    after_by_chance: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class GenderMeasures(Brief):
    """The figures of an audit at one threshold, all in [0, 1].

    Attributes
    ----------
    accuracy, balanced_accuracy, recall_woman, recall_man
        Shares classified as labelled.
    gender_gap
        |recall_woman - recall_man|.
    worst_group_accuracy
        The smallest accuracy over genders, and professions by gender.
    equal_opportunity_gap, equalized_odds_gap, demographic_parity_gap
        Fairlearn's differences over professions.
    skew
        Mean |P(woman) - 0.5| over ungendered items.
    """

    accuracy: Change
    balanced_accuracy: Change
    recall_woman: Change
    recall_man: Change
    gender_gap: Change
    worst_group_accuracy: Change
    equal_opportunity_gap: Change
    equalized_odds_gap: Change
    demographic_parity_gap: Change
    skew: Change


@dataclass(frozen=True, slots=True, repr=False)
class ProfessionAudit(Brief):
    """The figures of one profession, at the threshold 0.

    Attributes
    ----------
    profession, women, men, ungendered
        Its name, and its items by label.
    accuracy, auc
        Of its gendered items.
    p_woman
        Mean over its ungendered items.
    """

    profession: str
    women: int
    men: int
    ungendered: int
    accuracy: Change
    auc: Change
    p_woman: Change


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class NullTest(Brief):
    """An ablation against random feature sets of the same size and of like firing rates and energies.

    Attributes
    ----------
    measure
        AUC, SKEW or WORST_GROUP_ACCURACY; the last two at the recalibrated threshold.
    observed, null
        Its change by the ablation, and by each random set (shape [sets]).
    p
        Share of random sets that change it at least as much, the ablation counted in.
    """

    measure: str
    observed: float
    null: Floats
    p: float


def _curve(message: Any) -> Floats:
    columns = [field.name for field in bias_service_pb2.ThresholdPoint.DESCRIPTOR.fields]
    points = [[getattr(point, column) for column in columns] for point in message.curve]
    return np.array(points, dtype=np.float32).reshape(-1, len(columns))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class AblationAudit(Brief):
    """The audit of one ablation.

    Attributes
    ----------
    ablation, set_size
        As used, and the features that it removes.
    verdict
        What it comes to.
    auc
        Women told from men; no threshold is involved.
    raw, recalibrated
        Figures at the threshold 0, and at thresholds chosen anew before and after.
    threshold_before, threshold_after
        The thresholds chosen.
    professions
        In the order of their names.
    curve
        Shape [points, 5]: threshold, recall of women and of men before, of women and of men after.
    nulls, null_energy_ratio
        Against the matched null, and how well that is matched (1 is perfectly); empty and None for LEACE.
    probe
        Balanced accuracy of a linear classifier trained anew.
    kept, neighbours_kept
        Mean cosine before and after, and mean share of nearest items that stay nearest.
    harms
        Names of recalibrated figures that got worse, their intervals leaving 0 out.
    """

    ablation: Ablation
    set_size: int
    verdict: AuditVerdict
    auc: Change
    raw: GenderMeasures
    recalibrated: GenderMeasures
    threshold_before: float
    threshold_after: float
    professions: tuple[ProfessionAudit, ...]
    curve: Floats = field(metadata=wire(_curve))
    nulls: tuple[NullTest, ...]
    null_energy_ratio: float | None
    probe: Change
    kept: float
    neighbours_kept: float
    harms: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class SkippedItem(Brief):
    """An item that was left out: its place in the stream, its id, and why."""

    index: int
    id: str
    message: str
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class AuditResult(Brief):
    """The audit of the caller's items.

    Attributes
    ----------
    audits
        One an ablation, in order.
    women, men, ungendered
        Items audited, by label.
    skipped, skipped_items
        How many were left out, and the first of them.
    settings
        As used.
    timings, bundle
        Where the time went, and the bundle that answered.
    """

    audits: tuple[AblationAudit, ...]
    women: int
    men: int
    ungendered: int
    skipped: int
    skipped_items: tuple[SkippedItem, ...]
    settings: AuditSettings = field(repr=False)
    timings: Timings
    bundle: str
