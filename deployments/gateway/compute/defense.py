"""What the defense finds of images, as the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from monofacet.v1 import common_pb2
from monofacet.v1 import defense_service_pb2 as pb
from numpy.typing import NDArray

from deployments.encoder.tasks import Features
from deployments.gateway.cards import label_value
from deployments.gateway.compute.decoders import Decoder
from services.defense import (
    DefenseCalibration,
    FilterChoice,
    FilterMode,
    Look,
    Reason,
    Screened,
    screen,
)
from services.defense.labels import zero_shot
from services.modality.tables import ModalityTable

MODES: dict[pb.FilterMode.ValueType, FilterMode | None] = {
    pb.FILTER_MODE_UNSPECIFIED: None,
    **{pb.FilterMode.Value(f"FILTER_MODE_{mode.value}"): mode for mode in FilterMode},
}


def mode_value(mode: FilterMode) -> pb.FilterMode.ValueType:
    """Return the contract's value of a filter mode."""
    return pb.FilterMode.Value(f"FILTER_MODE_{mode.value}")


def verdict_name(screened: Screened) -> str:
    """Return the verdict as the metric's label."""
    return "adversarial" if screened.adversarial else "clean"


def looks(unit: NDArray[np.float32], features: Sequence[Features]) -> list[Look]:
    """Return embeddings and their active features as looks."""
    return [Look(e, item.indices, item.values) for e, item in zip(unit, features, strict=True)]


class LabelTexts:
    """Texts and their unit embeddings, for zero-shot labels.

    Parameters
    ----------
    texts
        At least one.
    units
        float32, shape (texts, embed_dim).
    logit_scale
        Of the towers.
    """

    def __init__(self, texts: Sequence[str], units: NDArray[np.float32], logit_scale: float) -> None:
        self._texts = texts
        self._units = units
        self._logit_scale = logit_scale

    def nearest(self, units: NDArray[np.float32]) -> list[pb.ZeroShotLabel]:
        """Return the text that each of several embeddings, shape (B, embed_dim), is nearest to."""
        found = zero_shot(units, self._units, self._logit_scale)
        rows = zip(found.index.tolist(), found.probability.tolist(), found.similarity.tolist(), strict=True)
        return [
            pb.ZeroShotLabel(text=self._texts[i], index=i, probability=p, similarity=s) for i, p, s in rows
        ]


@dataclass(frozen=True)
class Question:
    """One request's images, and how they are to be judged.

    Attributes
    ----------
    looks, smoothed, noise
        As `services.defense.screen` wants them.
    choice, filter_all
        As `services.defense.screen` wants them.
    labels
        For the zero-shot labels.
    """

    looks: Sequence[Look]
    smoothed: Sequence[Look] | None
    noise: NDArray[np.float32]
    choice: FilterChoice
    filter_all: bool
    labels: LabelTexts


@dataclass(frozen=True)
class Verdicts:
    """What was found of one request's images, and their nearest labels before and after."""

    screened: list[Screened]
    before: list[pb.ZeroShotLabel]
    after: list[pb.ZeroShotLabel]


def judge(
    questions: Sequence[Question],
    calibration: DefenseCalibration,
    decoder: Decoder,
    false_positive_rate: float,
) -> list[Verdicts]:
    """Judge the images of several requests; those that ask the same are one batch.

    A batch reads the decoder and the label embeddings once, which are most of the work.
    """
    alike: dict[object, list[int]] = {}
    for i, question in enumerate(questions):
        key = (question.choice, question.filter_all, question.smoothed is None, id(question.labels))
        alike.setdefault(key, []).append(i)
    answers: dict[int, Verdicts] = {}
    for places in alike.values():
        group = [questions[i] for i in places]
        one = group[0]
        screened = screen(
            [look for question in group for look in question.looks],
            np.concatenate([question.noise for question in group]),
            None
            if one.smoothed is None
            else [look for question in group for look in question.smoothed or ()],
            calibration,
            decoder.rows,
            decoder.origin,
            choice=one.choice,
            false_positive_rate=false_positive_rate,
            filter_all=one.filter_all,
        )
        before = one.labels.nearest(np.stack([look.unit for question in group for look in question.looks]))
        after = list(before)
        changed = [i for i, found in enumerate(screened) if found.was_filtered]
        if changed:
            labels = one.labels.nearest(np.stack([screened[i].unit for i in changed]))
            for i, label in zip(changed, labels, strict=True):
                after[i] = label
        start = 0
        for place, question in zip(places, group, strict=True):
            part = slice(start, start + len(question.looks))
            answers[place] = Verdicts(screened[part], before[part], after[part])
            start = part.stop
    return [answers[i] for i in range(len(questions))]


def filtered_images(
    verdicts: Verdicts, table: FeatureLabels | None, max_features: int
) -> list[pb.FilteredImage]:
    """Return what was found of one request's images.

    Parameters
    ----------
    verdicts
        What was found.
    table
        Labels and names of the features; None without any.
    max_features
        Features of an image to list.
    """
    return [
        _filtered_image(screened, before, after, table, max_features)
        for screened, before, after in zip(verdicts.screened, verdicts.before, verdicts.after, strict=True)
    ]


def _filtered_image(
    screened: Screened,
    before: pb.ZeroShotLabel,
    after: pb.ZeroShotLabel,
    table: FeatureLabels | None,
    max_features: int,
) -> pb.FilteredImage:
    (suspicious,) = np.nonzero(screened.found.any)
    return pb.FilteredImage(
        verdict=pb.VERDICT_ADVERSARIAL if screened.adversarial else pb.VERDICT_CLEAN,
        score=screened.score,
        threshold=screened.threshold,
        p_value=screened.p_value,
        scores=pb.DetectionScores(**screened.scores),
        features=_features(screened, suspicious, table, max_features),
        suspicious_features=len(suspicious),
        filtered=screened.was_filtered,
        label_before=before,
        label_after=after,
    )


class FeatureLabels:
    """Labels and names of a dictionary's features as messages want them: of a list, not of an array.

    Parameters
    ----------
    table
        Of the dictionary.
    """

    def __init__(self, table: ModalityTable) -> None:
        self.labels = [label_value(str(label)) for label in table.label]
        self.names = [str(name) for name in table.name]


def _features(
    screened: Screened, suspicious: NDArray[np.intp], table: FeatureLabels | None, limit: int
) -> list[pb.SuspiciousFeature]:
    found = screened.found
    values, filtered = found.values[suspicious], screened.filtered[suspicious]
    # The last key is the first to sort by.
    order = suspicious[np.lexsort((-values, -np.abs(filtered - values)))[:limit]]
    reasons: list[list[pb.SuspicionReason.ValueType]] = [[] for _ in order]
    for reason, holds in found.reasons.items():
        for i in np.flatnonzero(holds[order]).tolist():
            reasons[i].append(_REASONS[reason])
    rows = zip(
        found.indices[order].tolist(),
        found.values[order].tolist(),
        screened.filtered[order].tolist(),
        reasons,
        strict=True,
    )
    return [
        pb.SuspiciousFeature(
            feature=feature,
            activation=activation,
            filtered=kept,
            reasons=why,
            label=common_pb2.MODALITY_LABEL_UNSPECIFIED if table is None else table.labels[feature],
            name="" if table is None else table.names[feature],
        )
        for feature, activation, kept, why in rows
    ]


_REASONS = {reason: pb.SuspicionReason.Value(f"SUSPICION_REASON_{reason.value}") for reason in Reason}
