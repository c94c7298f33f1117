"""BiasService: how gendered the towers see people, and what ablating features does about it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from monofacet.v1 import bias_service_pb2 as pb
from monofacet.v1 import bias_service_pb2_grpc

from deployments.encoder.tasks import AuditRequest, Encoded, EncodeTask
from deployments.gateway.admission.client_streams import ClientStreams
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.ablation import Ablations
from deployments.gateway.compute.audit import AuditItems, audit_settings
from deployments.gateway.compute.decoders import Decoders
from deployments.gateway.compute.gender import classify_gender
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.interceptors.validation import validate
from deployments.gateway.messages import check_texts, items_of, relocated, timings
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.errors import InvalidInput, Violation

if TYPE_CHECKING:
    from services.bias.audit import Audit

RunAudit = Callable[[AuditRequest], Awaitable["tuple[Audit, ...]"]]

_CLASSIFY = "monofacet.v1.BiasService/ClassifyGender"
_AUDIT = "monofacet.v1.BiasService/AuditGender"
# Inputs that are worth a thread; fewer are done before a thread would have started.
_THREAD_ITEMS = 64
_BAD_ITEM = re.compile(r"\[(\d+)\]")
_MESSAGE_ITEM = re.compile(r"batch\.items\[(\d+)\](.*)")


class BiasServicer(bias_service_pb2_grpc.BiasServiceServicer):
    """Answers BiasService.

    Parameters
    ----------
    encoder
        Where inputs are encoded.
    run_audit
        Computes audits away from this event loop.
    catalogue, decoders
        Labels and rows of the dictionaries.
    logit_scale
        Of the towers.
    streams
        Admits audits.
    settings, metrics
        Of the server.
    """

    def __init__(
        self,
        encoder: EncoderClient,
        run_audit: RunAudit,
        catalogue: Catalogue,
        decoders: Decoders,
        logit_scale: float,
        streams: ClientStreams,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._encoder = encoder
        self._run_audit = run_audit
        self._ablations = Ablations(catalogue, decoders)
        self._logit_scale = logit_scale
        self._streams = streams
        self._settings = settings
        self._metrics = metrics
        self._bundle = catalogue.bundle.id

    async def ClassifyGender(  # noqa: N802
        self, request: pb.ClassifyGenderRequest, context: Any
    ) -> pb.ClassifyGenderResponse:
        """Score each input before and after the ablation."""
        if len(request.inputs) > self._settings.max_items:
            message = f"{len(request.inputs)} inputs; {self._settings.max_items} are allowed"
            raise InvalidInput(message, [("inputs", message)])
        calibration = self._ablations.calibration
        asked = request.ablation if request.HasField("ablation") else None
        resolved = None if asked is None else await self._ablations.resolve(asked, "ablation")
        items = items_of(request.inputs)
        # LEACE needs no features, and neither does a score without an ablation.
        needs_features = resolved is not None and resolved.plan.features is not None
        dictionary = resolved.message.dictionary if resolved is not None and needs_features else None
        task = EncodeTask(items, dictionary, truncate_text=request.truncate_text)
        try:
            check_texts(task.items, self._settings.max_text_bytes, task.truncate_text)
            encoded = await self._encoder.encode(task, context.time_remaining())
        except InvalidInput as error:
            raise relocated(error, lambda i: f"inputs[{i}]") from error
        self._metrics.items.labels(_CLASSIFY).inc(len(items))
        arguments = (items, encoded, calibration, self._logit_scale, resolved)
        answers = (
            classify_gender(*arguments)
            if len(items) < _THREAD_ITEMS
            else await asyncio.to_thread(classify_gender, *arguments)
        )
        return pb.ClassifyGenderResponse(
            classifications=answers,
            ablation=None if resolved is None else resolved.message,
            set_size=0 if resolved is None else resolved.set_size,
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )

    async def AuditGender(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.AuditGenderRequest], context: Any
    ) -> pb.AuditGenderResponse:
        """Audit ablations on the caller's items.

        Batches are read one at a time, and of each item only its embedding, active features and labels are
        kept: at most `max_audit_items` of them, in `max_client_streams` streams.
        """
        with self._streams.admitted(request_iterator) as requests:
            return await self._audit(requests, context)

    async def _audit(
        self, requests: AsyncIterator[pb.AuditGenderRequest], context: Any
    ) -> pb.AuditGenderResponse:
        items: AuditItems | None = None
        async for message in requests:
            is_settings = message.WhichOneof("payload") == "settings"
            if is_settings != (items is None):
                what = "must be the first message, exactly once"
                raise InvalidInput(f"settings {what}", [("settings", what)])
            if items is None:
                validate(message)
                items = await self._begin(message.settings)
            else:
                await self._add(message, items, context)
        if items is None:
            what = "must be the first message, exactly once"
            raise InvalidInput(f"settings {what}", [("settings", what)])
        request = items.request(self._ablations.calibration, self._logit_scale, context.time_remaining())
        audits = await self._run_audit(request)
        return await asyncio.to_thread(items.response, audits, self._bundle)

    async def _begin(self, asked: pb.AuditSettings) -> AuditItems:
        ablations = [
            await self._ablations.resolve(ablation, f"settings.ablations[{i}]")
            for i, ablation in enumerate(asked.ablations)
        ]
        for i, resolved in enumerate(ablations):
            if resolved.message.dictionary != ablations[0].message.dictionary:
                what = "all ablations of an audit must be of one dictionary"
                raise InvalidInput(what, [(f"settings.ablations[{i}].dictionary", what)])
        settings = audit_settings(asked, ablations)
        return AuditItems(settings, tuple(ablations), self._settings.max_audit_items)

    async def _add(self, message: pb.AuditGenderRequest, items: AuditItems, context: Any) -> None:
        batch = message.batch.items
        items.check_room(len(batch))
        start = items.seen
        items.seen += len(batch)
        skip = items.settings.on_bad_item == pb.BAD_ITEM_POLICY_SKIP
        broken: dict[int, InvalidInput] = {}
        try:
            validate(message)
        except InvalidInput as error:
            broken = broken_items(error)
            if not skip or not broken:
                raise _in_stream(error, start) from error
        for i, why in broken.items():
            items.skip(start + i, batch[i], why)
        places = [i for i in range(len(batch)) if i not in broken]
        while places:
            chosen = [batch[i] for i in places]
            try:
                encoded = await self._encode(chosen, items, context)
            except InvalidInput as error:
                bad = bad_items(error)
                if not skip or not bad:
                    raise _of_stream(error, [start + place for place in places]) from error
                for i, why in bad.items():
                    items.skip(start + places[i], chosen[i], why)
                places = [place for i, place in enumerate(places) if i not in bad]
                continue
            items.add(chosen, encoded)
            self._metrics.items.labels(_AUDIT).inc(len(chosen))
            return

    async def _encode(self, chosen: Sequence[pb.LabelledItem], items: AuditItems, context: Any) -> Encoded:
        task = EncodeTask(
            items_of(item.input for item in chosen),
            items.dictionary,
            truncate_text=items.settings.truncate_text,
            stream=items.stream,
        )
        check_texts(task.items, self._settings.max_text_bytes, task.truncate_text)
        return await self._encoder.encode_patiently(task, context.time_remaining())


def bad_items(error: InvalidInput) -> dict[int, InvalidInput]:
    """Return what is wrong with each item that `error` blames, by its number in the task."""
    found: dict[int, InvalidInput] = {}
    for path, description, reason in error.violations:
        match = _BAD_ITEM.match(path)
        if match is not None:
            found[int(match.group(1))] = InvalidInput(description, reason=reason)
    return found


def broken_items(error: InvalidInput) -> dict[int, InvalidInput]:
    """Return what is wrong with each item of a message, by its place in it; nothing where more than items is."""
    found: dict[int, list[Violation]] = {}
    for violation in error.violations:
        match = _MESSAGE_ITEM.fullmatch(violation.path)
        if match is None:
            return {}
        inner = violation._replace(path=match.group(2).removeprefix("."))
        found.setdefault(int(match.group(1)), []).append(inner)
    return {
        i: InvalidInput(": ".join(part for part in violations[0][:2] if part), violations)
        for i, violations in sorted(found.items())
    }


def _of_stream(error: InvalidInput, places: Sequence[int]) -> InvalidInput:
    """Return `error` of a task with paths that count the items over the stream; `places` are theirs in it."""
    return relocated(error, lambda i: f"items[{places[i]}].input")


def _in_stream(error: InvalidInput, start: int) -> InvalidInput:
    """Return `error` with paths that count the items over the stream: `items[41].input.image.data`."""

    def move(path: str) -> str:
        match = _MESSAGE_ITEM.fullmatch(path)
        return path if match is None else f"items[{start + int(match.group(1))}]{match.group(2)}"

    return error.moved(move)
