# Generated from ../_async/imaging.py by tools/sync_side.py: edit that one, and run `make protos`.
"""Calls of ImagingService."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import grpc

from monofacet import _imaging_requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._base import Deadline
from monofacet._convert import read
from monofacet._inputs import Image, Input
from monofacet._sync.core import SyncCore
from monofacet._sync.transport import blocking
from monofacet.v1 import imaging_service_pb2, imaging_service_pb2_grpc


class ImagingCalls(SyncCore):
    """Images from texts, steered by features."""

    def generate(
        self,
        prompt: str = "",
        *,
        on_event: Callable[[types.GenerationEvent], None] | None = None,
        timeout: float | None = None,
        **options: Unpack[types.GenerateOptions],
    ) -> types.GenerationResult:
        """Make images.

        Parameters
        ----------
        prompt
            What to draw.
        on_event
            Called with each event as it comes: progress with every step, previews if asked for, images.
        timeout
            Seconds for the whole call. Default `Timeout.stream`.
        **options
            Seeds, edits and all the rest: see `GenerateOptions`.

        Returns
        -------
        GenerationResult
            In the order of the seeds. An image that failed has its `error` set.

        Raises
        ------
        InputError
            If something cannot be sent.
        CallError
            If the call fails.
        """
        return self._gather(self.generate_events(prompt, timeout=timeout, **options), on_event)

    def generate_events(
        self, prompt: str = "", *, timeout: float | None = None, **options: Unpack[types.GenerateOptions]
    ) -> Iterator[types.GenerationEvent]:
        """Make images, event by event. Leaving the loop early stops the work on the server within a step.

        Parameters
        ----------
        prompt, timeout, **options
            As for `generate`.

        Yields
        ------
        GenerationProgress, GenerationPreview or GeneratedImage
            As they come.
        """
        return self._events(blocking(requests.generate, prompt, options), timeout)

    def generate_like(
        self,
        image: Image,
        *,
        on_event: Callable[[types.GenerationEvent], None] | None = None,
        timeout: float | None = None,
    ) -> types.GenerationResult:
        """Make an image again from itself: a PNG of `generate` carries its request.

        Parameters
        ----------
        image
            The PNG: a path object or bytes.
        on_event, timeout
            As for `generate`.

        Returns
        -------
        GenerationResult
            With one image; from the same bundle, device and backend the same bytes.

        Raises
        ------
        InputError
            If the image carries no request.
        """
        return self._gather(self._events(blocking(requests.request_of, image), timeout), on_event)

    def preview_steering(
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
        """Tell what edits do to the embedding of a text or an image, without making an image.

        Parameters
        ----------
        value
            A text or an image.
        edits
            In order.
        attributes
            Attributes to turn, after the edits.
        dose
            Rescales the whole change to this dose, 0 to 4, in a bundle that knows doses.
        dictionary
            Its name; empty for the default one.
        delta
            Rescales the whole change to this size, 0 to 2.
        max_captions, max_features
            Listed before and after.
        truncate
            Cut texts at the tower's context length instead of refusing them.
        timeout
            Seconds for the call, all its tries included.

        Returns
        -------
        SteeringPreview
            Before and after.
        """
        several = [edits] if isinstance(edits, types.SteeringEdit) else edits

        def make() -> imaging_service_pb2.PreviewSteeringRequest:
            steering = requests.steering(several, dictionary, delta=delta, attributes=attributes, dose=dose)
            return requests.preview_steering(value, steering, max_captions, max_features, truncate)

        request = blocking(make)
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)
        return read(types.SteeringPreview, self._call(stub.PreviewSteering, request, timeout))

    def attributes(self, *, timeout: float | None = None) -> types.AttributeList:
        """List the attributes that pictures can be steered by, each with what it was measured to do.

        Parameters
        ----------
        timeout
            Seconds for the call, all its tries included.

        Returns
        -------
        AttributeList
            Empty in a bundle without any.
        """
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)
        request = imaging_service_pb2.ListAttributesRequest()
        return read(types.AttributeList, self._call(stub.ListAttributes, request, timeout))

    def attribute(self, name: str, *, timeout: float | None = None) -> types.Attribute:
        """Get one attribute by its name.

        Parameters
        ----------
        name
            Of the attribute.
        timeout
            Seconds for the call, all its tries included.

        Returns
        -------
        Attribute
            Its card.

        Raises
        ------
        CallError
            With the code NOT_FOUND if there is no such attribute.
        """
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)
        request = requests.get_attribute(name)
        response = self._call(stub.GetAttribute, request, timeout)
        return read(types.Attribute, response.attribute)

    def _gather(
        self,
        events: Iterator[types.GenerationEvent],
        on_event: Callable[[types.GenerationEvent], None] | None,
    ) -> types.GenerationResult:
        gathered = []
        for event in events:
            if on_event is not None:
                on_event(event)
            gathered.append(event)
        return responses.generation_result(gathered)

    def _events(
        self, request: imaging_service_pb2.GenerateRequest, timeout: float | None
    ) -> Iterator[types.GenerationEvent]:
        made = request
        deadline = Deadline(self._timeout.stream if timeout is None else timeout)
        call, answers, first = self._start(made, deadline)
        try:
            if first is not None:
                yield responses.generation_event(first)
                while (response := self._next(answers)) is not None:
                    yield responses.generation_event(response)
        except grpc.RpcError as error:
            raise self._failed(error) from error
        finally:
            call.cancel()

    def _start(
        self, request: imaging_service_pb2.GenerateRequest, deadline: Deadline
    ) -> tuple[Any, Iterator[Any], Any]:
        """Start the stream, and try again until its first event: nothing was answered before it."""
        self._addressed(request)
        stub = self._stub(imaging_service_pb2_grpc.ImagingServiceStub)

        def attempt() -> tuple[Any, Iterator[Any], Any]:
            call = self._begin(stub.Generate, request, deadline)
            answers = iter(call)
            try:
                return call, answers, self._next(answers)
            except grpc.RpcError as error:
                raise self._failed(error) from error

        return self._again(attempt, deadline)
