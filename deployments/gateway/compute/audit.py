"""What one AuditGender stream keeps, and the audit as the contract's message."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from monofacet.v1 import bias_service_pb2 as pb

from deployments.encoder.tasks import AuditRequest, Encoded, Features
from deployments.gateway.compute.ablation import Resolved
from deployments.gateway.interceptors.chain import current_caller
from deployments.gateway.messages import timings
from services.bias.calibration import BiasCalibration
from services.bias.cases import MAN, UNGENDERED, WOMAN
from services.errors import InvalidInput

if TYPE_CHECKING:
    from services.bias.audit import Audit, Profession
    from services.bias.measures import Change, Estimate

GENDERS = {pb.GENDER_UNSPECIFIED: UNGENDERED, pb.GENDER_WOMAN: WOMAN, pb.GENDER_MAN: MAN}
# Named in the answer; beyond them only counted.
MAX_NAMED = 1_000


def audit_settings(asked: pb.AuditSettings, ablations: Iterable[Resolved]) -> pb.AuditSettings:
    """Return the settings with every field set: the contract's defaults where the caller set none."""
    used = pb.AuditSettings(
        ablations=[resolved.message for resolved in ablations],
        on_bad_item=asked.on_bad_item or pb.BAD_ITEM_POLICY_FAIL,
        bootstrap_samples=1_000,
        null_sets=1_000,
        min_group=5,
        seed=0,
        truncate_text=asked.truncate_text,
    )
    for name in ("bootstrap_samples", "null_sets", "min_group", "seed"):
        if asked.HasField(name):
            setattr(used, name, getattr(asked, name))
    return used


@dataclass(slots=True)
class AuditItems:
    """The items so far: of each its embedding, its active features and its labels; never its picture.

    Attributes
    ----------
    settings
        As used.
    ablations
        Resolved, all of one dictionary.
    max_items
        Items that the stream may hold, skipped ones included.
    seen
        Items so far, skipped ones included.
    skipped
        How many were left out, and the first of them.
    queue_s, inference_s
        The longest wait and the sum of inference over the batches, seconds.
    stream
        Names it in the work for the encoder: a stream that waits is no call that is refused.
    """

    settings: pb.AuditSettings
    ablations: tuple[Resolved, ...]
    max_items: int
    seen: int = 0
    skipped: int = 0
    skipped_items: list[pb.SkippedItem] = field(default_factory=list)
    queue_s: float = 0.0
    inference_s: float = 0.0
    stream: str = field(default_factory=partial(secrets.token_hex, 8))
    _units: list[np.ndarray] = field(default_factory=list)
    _features: list[Features] = field(default_factory=list)
    _is_text: list[bool] = field(default_factory=list)
    _gender: list[int] = field(default_factory=list)
    _profession: list[str] = field(default_factory=list)
    _cluster: list[str] = field(default_factory=list)

    @property
    def dictionary(self) -> str:
        """Name of the dictionary."""
        return str(self.settings.ablations[0].dictionary)

    def check_room(self, more: int) -> None:
        """Raise InvalidInput when `more` items would pass the limit; before anything of them is encoded."""
        if self.seen + more > self.max_items:
            message = f"more than {self.max_items} items"
            raise InvalidInput(message, [(f"items[{self.max_items}]", message)], reason="TOO_MANY_ITEMS")

    def add(self, items: Sequence[pb.LabelledItem], encoded: Encoded) -> None:
        """Keep what was encoded of `items`."""
        self._units.append(encoded.unit)
        self._features.extend(encoded.features)
        self._is_text += [item.input.WhichOneof("input") == "text" for item in items]
        self._gender += [GENDERS[item.gender] for item in items]
        self._profession += [item.profession for item in items]
        self._cluster += [item.cluster for item in items]
        self.queue_s = max(self.queue_s, encoded.queue_s)
        self.inference_s += encoded.inference_s

    def skip(self, index: int, item: pb.LabelledItem, error: InvalidInput) -> None:
        """Leave out the item at `index` of the stream."""
        self.skipped += 1
        if len(self.skipped_items) < MAX_NAMED:
            self.skipped_items.append(
                pb.SkippedItem(index=index, id=item.id[:256], message=error.message, reason=error.reason)
            )

    def request(
        self, calibration: BiasCalibration, logit_scale: float, remaining_s: float | None
    ) -> AuditRequest:
        """Return what is to be audited.

        Raises
        ------
        InvalidInput
            Where no item is left.
        """
        if not self._units:
            raise InvalidInput("there are no items to audit", reason="NOT_ENOUGH_ITEMS")
        return AuditRequest(
            dictionary=self.dictionary,
            unit=np.concatenate(self._units),
            features=tuple(self._features),
            is_text=np.array(self._is_text),
            gender=np.array(self._gender),
            profession=tuple(self._profession),
            cluster=tuple(self._cluster),
            direction=calibration.direction,
            means={m: side.means for m, side in calibration.dictionaries[self.dictionary].sides.items()},
            plans=tuple((r.plan.mode.value, r.plan.features) for r in self.ablations),
            leace=calibration.leace,
            logit_scale=logit_scale,
            bootstrap_samples=self.settings.bootstrap_samples,
            null_sets=self.settings.null_sets,
            min_group=self.settings.min_group,
            seed=self.settings.seed,
            remaining_s=remaining_s,
            caller=current_caller.get(),
        )

    def response(self, audits: Sequence[Audit], bundle: str) -> pb.AuditGenderResponse:
        """Return the answer."""
        counts = {gender: self._gender.count(gender) for gender in (WOMAN, MAN, UNGENDERED)}
        return pb.AuditGenderResponse(
            audits=[audit_message(r, a) for r, a in zip(self.ablations, audits, strict=True)],
            women=counts[WOMAN],
            men=counts[MAN],
            ungendered=counts[UNGENDERED],
            skipped=self.skipped,
            skipped_items=self.skipped_items,
            settings=self.settings,
            timings=timings(self.queue_s, self.inference_s),
            bundle=bundle,
        )


def audit_message(resolved: Resolved, audit: Audit) -> pb.AblationAudit:
    """Return the audit of one ablation as a message."""
    message = pb.AblationAudit(
        ablation=resolved.message,
        set_size=resolved.set_size,
        verdict=pb.AuditVerdict.Value(f"AUDIT_VERDICT_{audit.verdict.value}"),
        auc=change(audit.auc),
        raw=pb.GenderMeasures(**{name: change(value) for name, value in audit.raw.items()}),
        recalibrated=pb.GenderMeasures(**{name: change(value) for name, value in audit.recalibrated.items()}),
        threshold_before=audit.threshold_before,
        threshold_after=audit.threshold_after,
        professions=[profession(found) for found in audit.professions],
        curve=[
            pb.ThresholdPoint(
                threshold=t,
                recall_woman_before=wb,
                recall_man_before=mb,
                recall_woman_after=wa,
                recall_man_after=ma,
            )
            for t, wb, mb, wa, ma in audit.curve.tolist()
        ],
        nulls=[
            pb.NullTest(
                measure=pb.ThresholdFreeMeasure.Value(f"THRESHOLD_FREE_MEASURE_{test.measure.upper()}"),
                observed=test.observed,
                null=test.null.tolist(),
                p=test.p,
            )
            for test in audit.nulls
        ],
        probe=change(audit.probe),
        kept=audit.kept,
        neighbours_kept=audit.neighbours_kept,
        harms=audit.harms,
    )
    if audit.null_energy_ratio is not None:
        message.null_energy_ratio = audit.null_energy_ratio
    return message


def profession(found: Profession) -> pb.ProfessionAudit:
    """Return the figures of one profession as a message."""
    return pb.ProfessionAudit(
        profession=found.name,
        women=found.women,
        men=found.men,
        ungendered=found.ungendered,
        accuracy=change(found.accuracy),
        auc=change(found.auc),
        p_woman=change(found.p_woman),
    )


def change(value: Change) -> pb.Change:
    """Return a change as a message."""
    message = pb.Change(
        before=estimate(value.before), after=estimate(value.after), difference=estimate(value.difference)
    )
    for name in ("before_by_chance", "after_by_chance"):
        if not math.isnan(number := getattr(value, name)):
            setattr(message, name, number)
    return message


def estimate(value: Estimate) -> pb.Estimate:
    """Return a figure as a message; NaN is left unset."""
    parts = {"value": value.value, "low": value.low, "high": value.high}
    return pb.Estimate(**{name: part for name, part in parts.items() if not math.isnan(part)})
