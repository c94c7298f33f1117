"""The fake's BiasService."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from google.protobuf import duration_pb2

from monofacet.testing._model import BUNDLE, DICTIONARY, EMBED_DIM, N_FEATURES, FakeModel
from monofacet.testing._status import abort
from monofacet.v1 import bias_service_pb2, bias_service_pb2_grpc, common_pb2

# First bytes of the formats that the contract knows.
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
LOGIT_SCALE = 5.0


class FakeBias(FakeModel, bias_service_pb2_grpc.BiasServiceServicer):
    """Scores gender along the first axis of the fake's embeddings; an ablation halves the score.

    An audit counts its items and answers figures that follow from the counts alone, the same for every ablation.
    """

    def ClassifyGender(self, request: bias_service_pb2.ClassifyGenderRequest, context: Any) -> Any:
        """Score a batch; every bad input is named."""
        self.check_bundle(request.bundle, context)
        problems = {
            f"inputs[{i}].image.data": "not a PNG, JPEG or WebP image"
            for i, item in enumerate(request.inputs)
            if _is_bad(item)
        }
        if problems:
            _refuse(context, f"{len(problems)} bad inputs", problems)
        response = bias_service_pb2.ClassifyGenderResponse(timings=_timings(), bundle=BUNDLE)
        if request.HasField("ablation"):
            response.ablation.CopyFrom(self._ablation(request.ablation, context, "ablation"))
            response.set_size = _set_size(response.ablation)
        for item in request.inputs:
            embedding = self.embed(item)
            score = float(embedding[0] / np.linalg.norm(embedding))
            answer = response.classifications.add(before=_score(score))
            if request.HasField("ablation"):
                answer.after.CopyFrom(_score(score / 2))
                answer.kept, answer.ablated_features = 0.9, min(response.set_size, EMBED_DIM)
        return response

    def AuditGender(self, requests: Iterator[Any], context: Any) -> Any:
        """Count the items by label; skip or refuse bad ones, as the settings say."""
        settings: bias_service_pb2.AuditSettings | None = None
        kept: list[bias_service_pb2.LabelledItem] = []
        response = bias_service_pb2.AuditGenderResponse(timings=_timings(), bundle=BUNDLE)
        seen = 0
        for request in requests:
            self.check_bundle(request.bundle, context)
            if (request.WhichOneof("payload") == "settings") != (settings is None):
                abort(
                    context, grpc.StatusCode.INVALID_ARGUMENT, "settings come first", reason="INVALID_STREAM"
                )
            if settings is None:
                settings = request.settings
                continue
            for item in request.batch.items:
                if not _is_bad(item.input):
                    kept.append(item)
                elif settings.on_bad_item == bias_service_pb2.BAD_ITEM_POLICY_SKIP:
                    response.skipped_items.add(
                        index=seen,
                        id=item.id,
                        message="not a PNG, JPEG or WebP image",
                        reason="INVALID_IMAGE",
                    )
                else:
                    problems = {f"items[{seen}].input.image.data": "not a PNG, JPEG or WebP image"}
                    _refuse(context, "1 bad item", problems)
                seen += 1
        if settings is None:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "settings come first", reason="INVALID_STREAM")
        genders = [item.gender for item in kept]
        response.skipped = len(response.skipped_items)
        response.women = genders.count(bias_service_pb2.GENDER_WOMAN)
        response.men = genders.count(bias_service_pb2.GENDER_MAN)
        response.ungendered = genders.count(bias_service_pb2.GENDER_UNSPECIFIED)
        for field, default in {
            "bootstrap_samples": 1000,
            "null_sets": 1000,
            "min_group": 5,
            "seed": 0,
        }.items():
            if not settings.HasField(field):  # type: ignore[arg-type]
                setattr(settings, field, default)
        for i, asked in enumerate(settings.ablations):
            asked.CopyFrom(self._ablation(asked, context, f"settings.ablations[{i}]"))
            response.audits.append(_audit(asked, response, kept))
        response.settings.CopyFrom(settings)
        return response

    def _ablation(
        self, asked: bias_service_pb2.Ablation, context: Any, path: str
    ) -> bias_service_pb2.Ablation:
        used = bias_service_pb2.Ablation()
        used.CopyFrom(asked)
        if used.dictionary not in ("", DICTIONARY):
            abort(
                context, grpc.StatusCode.NOT_FOUND, f"no dictionary {used.dictionary!r}",
                reason="UNKNOWN_DICTIONARY", violations={f"{path}.dictionary": "no such dictionary"},
            )  # fmt: skip
        used.dictionary = DICTIONARY
        used.mode = used.mode or bias_service_pb2.ABLATION_MODE_ZERO
        return used


def _set_size(ablation: bias_service_pb2.Ablation) -> int:
    selection = ablation.WhichOneof("selection")
    if selection == "features":
        return len(ablation.features.ids)
    if selection == "top_gender_features":
        return min(ablation.top_gender_features, N_FEATURES)
    return N_FEATURES // 4 if selection == "label" else 0


def _score(score: float) -> bias_service_pb2.GenderScore:
    p, calibrated = (1 / (1 + np.exp(-LOGIT_SCALE * (score - threshold))) for threshold in (0.0, 0.1))
    return bias_service_pb2.GenderScore(score=score, p_woman=p, p_woman_calibrated=calibrated)


def _audit(
    ablation: bias_service_pb2.Ablation,
    counts: bias_service_pb2.AuditGenderResponse,
    items: list[bias_service_pb2.LabelledItem],
) -> bias_service_pb2.AblationAudit:
    total = max(counts.women + counts.men + counts.ungendered, 1)
    measures = bias_service_pb2.GenderMeasures(
        **{
            field.name: _change(0.9, 0.9 - counts.women / total / 10)
            for field in bias_service_pb2.GenderMeasures.DESCRIPTOR.fields
        }
    )
    if not counts.ungendered:
        measures.skew.CopyFrom(bias_service_pb2.Change())
    audit = bias_service_pb2.AblationAudit(
        ablation=ablation,
        set_size=_set_size(ablation),
        verdict=bias_service_pb2.AUDIT_VERDICT_EFFECT,
        auc=_change(0.95, 0.6),
        raw=measures,
        recalibrated=measures,
        threshold_before=0.0,
        threshold_after=0.01,
        probe=_change(0.95, 0.7),
        kept=0.9,
        neighbours_kept=0.8,
    )
    for step in range(11):
        share = step / 10
        audit.curve.add(
            threshold=share - 0.5,
            recall_woman_before=1 - share,
            recall_man_before=share,
            recall_woman_after=1 - share**2,
            recall_man_after=share**2,
        )
    for profession in sorted({item.profession for item in items} - {""}):
        genders = [item.gender for item in items if item.profession == profession]
        audit.professions.add(
            profession=profession,
            women=genders.count(bias_service_pb2.GENDER_WOMAN),
            men=genders.count(bias_service_pb2.GENDER_MAN),
            ungendered=genders.count(bias_service_pb2.GENDER_UNSPECIFIED),
            accuracy=_change(0.9, 0.8),
            auc=bias_service_pb2.Change(),
            p_woman=_change(0.2, 0.45),
        )
    if ablation.mode != bias_service_pb2.ABLATION_MODE_LEACE:
        audit.null_energy_ratio = 1.02
        audit.nulls.add(
            measure=bias_service_pb2.THRESHOLD_FREE_MEASURE_AUC,
            observed=-0.35,
            null=[(i - 50) / 1000 for i in range(100)],
            p=1 / 101,
        )
    return audit


def _change(before: float, after: float) -> bias_service_pb2.Change:
    def estimate(value: float) -> bias_service_pb2.Estimate:
        return bias_service_pb2.Estimate(value=value, low=value - 0.05, high=value + 0.05)

    return bias_service_pb2.Change(
        before=estimate(before), after=estimate(after), difference=estimate(after - before)
    )


def _is_bad(item: common_pb2.Input) -> bool:
    return item.WhichOneof("input") == "image" and not item.image.data.startswith(SIGNATURES)


def _refuse(context: Any, message: str, problems: dict[str, str]) -> None:
    abort(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        message,
        reason="INVALID_IMAGE",
        violations=problems,
    )


def _timings() -> common_pb2.Timings:
    return common_pb2.Timings(
        queue=duration_pb2.Duration(nanos=1_000_000), inference=duration_pb2.Duration(nanos=2_000_000)
    )
