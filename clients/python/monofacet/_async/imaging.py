"""Calls of ImagingService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Unpack

import grpc

from monofacet import _imaging_requests as requests
from monofacet import _types as types
from monofacet._async.core import AsyncCore
from monofacet._base import Deadline
from monofacet._inputs import Image, Input
from monofacet._responses import imaging as responses
from monofacet.v1 import imaging_service_pb2, imaging_service_pb2_grpc


class ImagingCalls(AsyncCore):
    """Images from texts, steered by features."""

    async def generate(
        self,
        prompt: str = "",
        *,
        on_event: Callable[[types.GenerationEvent], None] | None = None,
        timeout: float | None = None,
        **options: Unpack[types.GenerateOptions],
    ) -> types.GenerationResult:
        """Make images; see `Client.generate`."""
        # Files are read and images encoded in a thread: both would hold up the loop.
        request = await asyncio.to_thread(requests.generate, prompt, options)
        return await self._gather(self._events(request, timeout), on_event)

    async def generate_events(
        self, prompt: str = "", *, timeout: float | None = None, **options: Unpack[types.GenerateOptions]
    ) -> AsyncIterator[types.GenerationEvent]:
        """Make images, event by event; see `Client.generate_events`.

        To leave the loop early and stop the work at once, use `contextlib.aclosing`.
        """
        request = await asyncio.to_thread(requests.generate, prompt, options)
        events = self._events(request, timeout)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def generate_like(
        self,
        image: Image,
        *,
        on_event: Callable[[types.GenerationEvent], None] | None = None,
        timeout: float | None = None,
    ) -> types.GenerationResult:
        """Make an image again from itself; see `Client.generate_like`."""
        request = await asyncio.to_thread(requests.request_of, image)
        return await self._gather(self._events(request, timeout), on_event)

    async def preview_steering(
        self,
        value: Input,
        edits: Sequence[types.SteeringEdit] | types.SteeringEdit = (),
        *,
        attributes: Sequence[types.SteeringAttribute | str] | types.SteeringAttribute | str = (),
        dose: float | None = None,
        dictionary: str = "",
        delta: float | None = None,
        max_captions: int = 5,
        max_features: int = 20,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> types.SteeringPreview:
        """Tell what edits do to an embedding; see `Client.preview_steering`."""
        several = [edits] if isinstance(edits, types.SteeringEdit) else edits

        def make() -> imaging_service_pb2.PreviewSteeringRequest:
            steering = requests.steering(several, dictionary, delta=delta, attributes=attributes, dose=dose)
            return requests.preview_steering(value, steering, max_captions, max_features, truncate)

        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)
        request = await asyncio.to_thread(make)
        return responses.steering_preview(await self._call(stub.PreviewSteering, request, timeout))

    async def attributes(self, *, timeout: float | None = None) -> types.AttributeList:
        """List the attributes that pictures can be steered by; see `Client.attributes`."""
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)
        request = imaging_service_pb2.ListAttributesRequest()
        return responses.attributes(await self._call(stub.ListAttributes, request, timeout))

    async def attribute(self, name: str, *, timeout: float | None = None) -> types.Attribute:
        """Get one attribute by its name; see `Client.attribute`."""
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)
        request = requests.get_attribute(name)
        return responses.attribute((await self._call(stub.GetAttribute, request, timeout)).attribute)

    async def _gather(
        self,
        events: AsyncIterator[types.GenerationEvent],
        on_event: Callable[[types.GenerationEvent], None] | None,
    ) -> types.GenerationResult:
        gathered = []
        async for event in events:
            if on_event is not None:
                on_event(event)
            gathered.append(event)
        return responses.generation_result(gathered)

    async def _events(
        self, request: imaging_service_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncIterator[types.GenerationEvent]:
        deadline = Deadline(self._timeout.stream if timeout is None else timeout)
        call, answers, first = await self._start(request, deadline)
        try:
            if first is not None:
                yield responses.generation_event(first)
                while (response := await self._next(answers)) is not None:
                    yield responses.generation_event(response)
        except grpc.RpcError as error:
            raise self._failed(error) from error
        finally:
            call.cancel()

    async def _start(
        self, request: imaging_service_pb2.GenerateRequest, deadline: Deadline
    ) -> tuple[Any, AsyncIterator[Any], Any]:
        """Start the stream, and try again until its first event: nothing was answered before it."""
        self._addressed(request)
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)

        async def attempt() -> tuple[Any, AsyncIterator[Any], Any]:
            call = self._begin(stub.Generate, request, deadline)
            answers = aiter(call)
            try:
                return call, answers, await self._next(answers)
            except grpc.RpcError as error:
                raise self._failed(error) from error

        return await self._again(attempt, deadline)
