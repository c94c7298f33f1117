"""ImagingService: images from a generator, and what edits do in feature space."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from google.rpc import status_pb2  # type: ignore[import-untyped]
from monofacet.v1 import imaging_service_pb2 as pb
from monofacet.v1 import imaging_service_pb2_grpc

from deployments.gateway.attributes import attribute
from deployments.gateway.bundles import Stream
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.decoders import Decoders
from deployments.gateway.compute.preview import SteeringPreviews, strongest
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.errors import describe
from deployments.gateway.interceptors.chain import current_caller
from deployments.gateway.messages import check_named_texts, sparse, tensor, timings
from deployments.gateway.pictures import picture, request_of_image
from deployments.gateway.steering import steering_of, task_of, texts_of
from deployments.generator.events import Event, Events, Failed, Finished, GenerateTask, Preview, Progress
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.bundle.manifest import DiffusionEntry
from services.errors import NoPipeline, UnknownAttribute

DEPLOYMENT = "generator"
_GENERATE = "monofacet.v1.ImagingService/Generate"
_PREVIEW = "monofacet.v1.ImagingService/PreviewSteering"
_DEFAULT_CAPTIONS = 5
_DEFAULT_FEATURES = 20


class ImagingServicer(imaging_service_pb2_grpc.ImagingServiceServicer):
    """Answers ImagingService.

    Parameters
    ----------
    encoder
        Where inputs of previews are encoded.
    generate
        Carries calls to a generator; None where no images are made.
    catalogue, decoders
        Labels, cards and rows of the dictionaries.
    settings, metrics
        Of the server.
    deployment
        Label of the metrics.
    """

    def __init__(
        self,
        encoder: EncoderClient,
        generate: Stream | None,
        catalogue: Catalogue,
        decoders: Decoders,
        settings: Settings,
        metrics: Metrics,
        deployment: str = DEPLOYMENT,
    ) -> None:
        self._deployment = deployment
        self._stream = generate
        self._entry = catalogue.bundle.manifest.diffusion
        self._previews = SteeringPreviews(encoder, catalogue, decoders, settings)
        self._attributes = catalogue.attributes
        self._settings = settings
        self._metrics = metrics
        self._bundle = catalogue.bundle.id
        self._name = catalogue.bundle.manifest.name
        self._images = 0
        if generate is not None:
            # The limit is that of each replica, the use that of this gateway.
            metrics.limited("max_queued_images", settings.max_queued_images, lambda: self._images, deployment)

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Make images."""
        entry = self._entry
        if entry is None:
            raise NoPipeline("this bundle has no text-to-image pipeline; PreviewSteering works without one")
        if self._stream is None:
            raise NoPipeline("this server makes no images; its setting `generator` is off")
        check_named_texts(texts_of(request), self._settings.max_text_bytes, request.truncate_text)
        task = replace(task_of(request, self._settings.max_images), caller=current_caller.get())
        left = task.images
        self._count(left)
        try:
            async with aclosing(self._stream("generate", task, context.time_remaining())) as messages:  # type: ignore[type-var]
                async for message in messages:
                    self._observe(message)
                    for event in message.events:
                        if isinstance(event, Finished):
                            left -= 1
                            self._count(-1)
                        yield await self._response(event, request, task, entry)
        finally:
            self._count(-left)

    def _count(self, images: int) -> None:
        self._images += images
        self._metrics.queue_items.labels(self._deployment).set(self._images)

    def _observe(self, message: Events) -> None:
        metrics = self._metrics
        for record in message.records:
            metrics.batch_size.labels(self._deployment).observe(record.items)
            metrics.inference_duration.labels(self._deployment, "torch").observe(record.seconds)
            metrics.generation_steps.inc(record.items)

    async def _response(
        self, event: Event, request: pb.GenerateRequest, task: GenerateTask, entry: DiffusionEntry
    ) -> pb.GenerateResponse:
        if isinstance(event, Failed):
            raise event.error
        response = pb.GenerateResponse(bundle=self._bundle)
        if isinstance(event, Progress):
            response.progress.steps.extend(event.steps)
            response.progress.num_inference_steps = event.num_steps
            response.progress.waiting = event.waiting
            return response
        unsteered, index = divmod(event.number, len(task.seeds))
        if isinstance(event, Preview):
            response.preview.index, response.preview.unsteered = index, bool(unsteered)
            response.preview.step = event.step
            response.preview.image.data = picture(event.pixels, request.format)
            return response
        image = response.image
        image.index, image.unsteered, image.seed = index, bool(unsteered), task.seeds[index]
        image.delta = event.delta
        if event.dose is not None:
            image.dose = event.dose
        if event.pixels is None:
            image.finish_reason = pb.FINISH_REASON_FAILED
            image.error.CopyFrom(self._status(event))
        else:
            image.finish_reason = pb.FINISH_REASON_COMPLETED
            attached = request_of_image(request, task, entry, event.number)
            # By its name: the id would bind the picture to one build of the bundle.
            attached.bundle = self._name
            # In a thread: compressing a large picture would hold up every other call.
            image.image.data = await asyncio.to_thread(
                picture, event.pixels, request.format, attached, self._bundle
            )
            self._metrics.items.labels(_GENERATE).inc()
            self._metrics.queue_duration.labels(self._deployment).observe(event.queue_s)
        response.timings.CopyFrom(timings(event.queue_s, event.inference_s))
        return response

    def _status(self, event: Finished) -> status_pb2.Status:
        _, status = describe(event.error or RuntimeError("no picture"), self._settings.retry_after_s)
        return status

    async def PreviewSteering(  # noqa: N802
        self, request: pb.PreviewSteeringRequest, context: Any
    ) -> pb.PreviewSteeringResponse:
        """Say what edits do to an embedding."""
        captions = request.max_captions if request.HasField("max_captions") else _DEFAULT_CAPTIONS
        limit = request.max_features if request.HasField("max_features") else _DEFAULT_FEATURES
        preview = await self._previews.preview(
            request.input,
            steering_of(request.steering),
            captions,
            request.truncate_text,
            context.time_remaining(),
        )
        self._metrics.items.labels(_PREVIEW).inc()
        steered = preview.steered
        return pb.PreviewSteeringResponse(
            features=sparse(preview.dictionary, strongest(steered.z, limit)),
            steered_features=sparse(preview.dictionary, strongest(steered.z_steered, limit)),
            steered_embedding=tensor(steered.unit.astype(np.float32)),
            delta=steered.delta,
            dose=steered.dose,
            captions=[pb.NearCaption(text=text, similarity=cosine) for text, cosine in preview.captions],
            steered_captions=[
                pb.NearCaption(text=text, similarity=cosine) for text, cosine in preview.steered_captions
            ],
            timings=timings(preview.queue_s, preview.inference_s),
            bundle=self._bundle,
        )

    async def ListAttributes(  # noqa: N802
        self, request: pb.ListAttributesRequest, context: Any
    ) -> pb.ListAttributesResponse:
        """List the bundle's attributes."""
        known = self._attributes
        if known is None:
            return pb.ListAttributesResponse(bundle=self._bundle, timings=timings())
        return pb.ListAttributesResponse(
            attributes=[attribute(known, name) for name in known.attributes],
            unit_dose=known.config.unit,
            bundle=self._bundle,
            timings=timings(),
        )

    async def GetAttribute(  # noqa: N802
        self, request: pb.GetAttributeRequest, context: Any
    ) -> pb.GetAttributeResponse:
        """Answer one attribute."""
        if self._attributes is None:
            message = f"no attribute {request.name!r}; this bundle has none"
            raise UnknownAttribute(message, [("name", message)])
        return pb.GetAttributeResponse(
            attribute=attribute(self._attributes, request.name),
            bundle=self._bundle,
            timings=timings(),
        )
