"""Encoded inputs and an ablation to the contract's gender classifications."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monofacet.v1 import bias_service_pb2 as pb
from numpy.typing import NDArray

from deployments.encoder.tasks import Encoded
from deployments.gateway.compute.ablation import Resolved
from services.bias.ablation import FeatureAblation, retained
from services.bias.activations import Stacked
from services.bias.calibration import BiasCalibration
from services.bias.gender import gender_scores, probability
from services.modality.modalities import Modality


def modality_of(item: bytes | str) -> Modality:
    """Return which tower encodes `item`."""
    return Modality.TEXT if isinstance(item, str) else Modality.IMAGE


def classify_gender(
    items: Sequence[bytes | str],
    encoded: Encoded,
    calibration: BiasCalibration,
    logit_scale: float,
    resolved: Resolved | None,
) -> list[pb.GenderClassification]:
    """Score inputs before and after an ablation.

    Parameters
    ----------
    items
        The inputs, for their modality.
    encoded
        Their embeddings, and all their active features where there is an ablation.
    calibration
        Direction and thresholds.
    logit_scale
        Of the towers.
    resolved
        The ablation; None for none.
    """
    answers = [pb.GenderClassification() for _ in items]
    sides = np.array([modality_of(item) is Modality.TEXT for item in items])
    for modality in Modality:
        chosen = np.flatnonzero(sides == (modality is Modality.TEXT))
        if not len(chosen):
            continue
        e = encoded.unit[chosen]
        threshold = calibration.thresholds[modality]
        before = _scores(e, calibration, logit_scale, threshold)
        for place, score in zip(chosen, before, strict=True):
            answers[place].before.CopyFrom(score)
        if resolved is None:
            continue
        ablator = resolved.plan.ablators[modality]
        # Without features asked for, as for LEACE, there are none.
        rows = [encoded.features[i] for i in chosen] if encoded.features else None
        z = Stacked.silent(len(chosen)) if rows is None else Stacked.of(rows)
        changed = ablator(e, z)
        after = _scores(changed, calibration, logit_scale, threshold)
        share = retained(e, changed)
        active = (
            ablator.active(z) if isinstance(ablator, FeatureAblation) else np.zeros(len(chosen), np.int64)
        )
        for row, place in enumerate(chosen):
            answers[place].after.CopyFrom(after[row])
            answers[place].kept = float(share[row])
            answers[place].ablated_features = int(active[row])
    return answers


def _scores(
    e: NDArray[np.float32], calibration: BiasCalibration, logit_scale: float, threshold: float
) -> list[pb.GenderScore]:
    scores = gender_scores(e, calibration.direction)
    # Nothing left of an input says nothing of its gender, whatever the threshold.
    empty = ~e.any(axis=1)
    raw = probability(scores, logit_scale)
    calibrated = np.where(empty, 0.5, probability(scores, logit_scale, threshold))
    return [
        pb.GenderScore(score=score, p_woman=p, p_woman_calibrated=c)
        for score, p, c in zip(scores, raw, calibrated, strict=True)
    ]
