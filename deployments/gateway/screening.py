"""What the defence finds of images, as the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monofacet.v1 import defense_service_pb2 as pb
from numpy.typing import NDArray

from deployments.gateway.cards import label_value
from deployments.work import Features
from services.defense import FilterMode, Look, Reason, Screened
from services.defense.labels import zero_shot
from services.tables import ModalityTable

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

    def nearest(self, unit: NDArray[np.float32]) -> pb.ZeroShotLabel:
        """Return the text that an embedding is nearest to."""
        found = zero_shot(unit, self._units, self._logit_scale)
        return pb.ZeroShotLabel(
            text=self._texts[found.index],
            index=found.index,
            probability=found.probability,
            similarity=found.similarity,
        )


def filtered_image(
    look: Look, screened: Screened, table: ModalityTable | None, labels: LabelTexts, max_features: int
) -> pb.FilteredImage:
    """Return what was found of one image.

    Parameters
    ----------
    look
        As encoded.
    screened
        What was found.
    table
        Labels and names of the features; None without one.
    labels
        For the zero-shot label.
    max_features
        Features to list.
    """
    suspicious = screened.found.any
    before = labels.nearest(look.unit)
    return pb.FilteredImage(
        verdict=pb.VERDICT_ADVERSARIAL if screened.adversarial else pb.VERDICT_CLEAN,
        score=screened.score,
        threshold=screened.threshold,
        p_value=screened.p_value,
        scores=pb.DetectionScores(**screened.scores),
        features=_features(screened, suspicious, table, max_features),
        suspicious_features=int(suspicious.sum()),
        filtered=screened.was_filtered,
        label_before=before,
        label_after=labels.nearest(screened.unit) if screened.was_filtered else before,
    )


def _features(
    screened: Screened, suspicious: NDArray[np.bool_], table: ModalityTable | None, limit: int
) -> list[pb.SuspiciousFeature]:
    found = screened.found
    chosen = np.flatnonzero(suspicious)
    # The last key is the first to sort by.
    order = np.lexsort((-found.values[chosen], -np.abs(screened.filtered - found.values)[chosen]))
    messages = []
    for i in chosen[order][:limit]:
        feature = int(found.indices[i])
        messages.append(
            pb.SuspiciousFeature(
                feature=feature,
                activation=float(found.values[i]),
                filtered=float(screened.filtered[i]),
                reasons=[_REASONS[reason] for reason, holds in found.reasons.items() if holds[i]],
                label=label_value("" if table is None else str(table.label[feature])),
                name="" if table is None else str(table.name[feature]),
            )
        )
    return messages


_REASONS = {reason: pb.SuspicionReason.Value(f"SUSPICION_REASON_{reason.value}") for reason in Reason}
