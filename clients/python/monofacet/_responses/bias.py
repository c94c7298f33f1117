"""Answers of BiasService."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._responses.encoding import join_timings, one_bundle, timings
from monofacet._responses.modality import LABELS
from monofacet.v1 import bias_service_pb2


def gender(
    responses: Sequence[bias_service_pb2.ClassifyGenderResponse], sizes: Sequence[int]
) -> types.GenderResult:
    """Read the answers to the parts of a batch.

    Parameters
    ----------
    responses
        One a part, in order; at least one.
    sizes
        Inputs of each part.

    Returns
    -------
    GenderResult
        Of the whole batch.

    Raises
    ------
    ResponseError
        If an answer does not hold one classification an input, or the server changed its bundle on the way.
    """
    for response, size in zip(responses, sizes, strict=True):
        if len(response.classifications) != size:
            raise exceptions.ResponseError(
                f"the answer holds {len(response.classifications)} classifications for {size} inputs"
            )
    first = responses[0]
    return types.GenderResult(
        tuple(_classification(item) for response in responses for item in response.classifications),
        ablation(first.ablation) if first.HasField("ablation") else None,
        first.set_size,
        join_timings([timings(response.timings) for response in responses]),
        one_bundle(response.bundle for response in responses),
    )


def _classification(message: bias_service_pb2.GenderClassification) -> types.GenderClassification:
    return types.GenderClassification(
        _score(message.before),
        _score(message.after) if message.HasField("after") else None,
        message.kept if message.HasField("kept") else None,
        message.ablated_features,
    )


def _score(message: bias_service_pb2.GenderScore) -> types.GenderScore:
    return types.GenderScore(message.score, message.p_woman, message.p_woman_calibrated)


def ablation(message: bias_service_pb2.Ablation) -> types.Ablation:
    """Read an ablation.

    Parameters
    ----------
    message
        As the server used it.

    Returns
    -------
    Ablation
        With its dictionary's name and mode.
    """
    selection = message.WhichOneof("selection")
    mode = bias_service_pb2.AblationMode.Name(message.mode).removeprefix("ABLATION_MODE_")
    return types.Ablation(
        features=tuple(message.features.ids) if selection == "features" else None,
        label=LABELS.get(message.label) if selection == "label" else None,
        top_gender_features=message.top_gender_features if selection == "top_gender_features" else None,
        mode=types.AblationMode(mode),
        dictionary=message.dictionary,
    )


def audit(response: bias_service_pb2.AuditGenderResponse) -> types.AuditResult:
    """Read an audit.

    Parameters
    ----------
    response
        With the settings as used.

    Returns
    -------
    AuditResult
        One audit an ablation.
    """
    used = response.settings
    return types.AuditResult(
        audits=tuple(_audit(message) for message in response.audits),
        women=response.women,
        men=response.men,
        ungendered=response.ungendered,
        skipped=response.skipped,
        skipped_items=tuple(
            types.SkippedItem(item.index, item.id, item.message, item.reason)
            for item in response.skipped_items
        ),
        settings=types.AuditSettings(
            ablations=tuple(ablation(message) for message in used.ablations),
            skip_bad_items=used.on_bad_item == bias_service_pb2.BAD_ITEM_POLICY_SKIP,
            bootstrap_samples=used.bootstrap_samples,
            null_sets=used.null_sets,
            min_group=used.min_group,
            seed=used.seed,
            truncate_text=used.truncate_text,
        ),
        timings=timings(response.timings),
        bundle=response.bundle,
    )


def _audit(message: bias_service_pb2.AblationAudit) -> types.AblationAudit:
    verdict = bias_service_pb2.AuditVerdict.Name(message.verdict).removeprefix("AUDIT_VERDICT_")
    if verdict not in types.AuditVerdict.__members__:
        raise exceptions.ResponseError(f"the answer holds verdict {verdict}, which this client does not know")
    return types.AblationAudit(
        ablation=ablation(message.ablation),
        set_size=message.set_size,
        verdict=types.AuditVerdict(verdict),
        auc=_change(message.auc),
        raw=_measures(message.raw),
        recalibrated=_measures(message.recalibrated),
        threshold_before=message.threshold_before,
        threshold_after=message.threshold_after,
        professions=tuple(
            types.ProfessionAudit(
                found.profession,
                found.women,
                found.men,
                found.ungendered,
                _change(found.accuracy),
                _change(found.auc),
                _change(found.p_woman),
            )
            for found in message.professions
        ),
        curve=np.array(
            [
                (
                    point.threshold,
                    point.recall_woman_before,
                    point.recall_man_before,
                    point.recall_woman_after,
                    point.recall_man_after,
                )
                for point in message.curve
            ],
            dtype=np.float32,
        ).reshape(-1, 5),
        nulls=tuple(
            types.NullTest(
                bias_service_pb2.ThresholdFreeMeasure.Name(test.measure).removeprefix(
                    "THRESHOLD_FREE_MEASURE_"
                ),
                test.observed,
                np.array(test.null, dtype=np.float32),
                test.p,
            )
            for test in message.nulls
        ),
        null_energy_ratio=message.null_energy_ratio if message.HasField("null_energy_ratio") else None,
        probe=_change(message.probe),
        kept=message.kept,
        neighbours_kept=message.neighbours_kept,
        harms=tuple(message.harms),
    )


def _measures(message: bias_service_pb2.GenderMeasures) -> types.GenderMeasures:
    return types.GenderMeasures(
        **{field.name: _change(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}
    )


def _change(message: bias_service_pb2.Change) -> types.Change:
    return types.Change(
        _estimate(message.before),
        _estimate(message.after),
        _estimate(message.difference),
        message.before_by_chance if message.HasField("before_by_chance") else None,
        message.after_by_chance if message.HasField("after_by_chance") else None,
    )


def _estimate(message: bias_service_pb2.Estimate) -> types.Estimate:
    return types.Estimate(
        message.value if message.HasField("value") else None,
        message.low if message.HasField("low") else None,
        message.high if message.HasField("high") else None,
    )
