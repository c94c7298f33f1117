"""A channel that calls a servicer in this process, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator
from typing import Any

from monofacet.testing._calls import Mock


class MockAioChannel(Mock):
    """A channel to a servicer in this process, for `AsyncClient`.

    The servicer is an ordinary synchronous one: all requests of a stream are read before it runs.

    Parameters
    ----------
    service
        What answers. Default a new `FakeMonofacet`.

    Attributes
    ----------
    service, calls, metadata, timeouts
        As for `MockChannel`.
    """

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Callable[..., Awaitable[Any]]:
        """Make a call with one request and one answer."""

        async def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            handler, context = self.begin(method, metadata, timeout)
            answer = handler.unary_unary(self.receive(method, handler, request_serializer(request)), context)
            return response_deserializer(handler.response_serializer(answer))

        return call

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Callable[..., _AioStream]:
        """Make a call with many requests and many answers."""

        async def answers(
            requests: AsyncIterable[Any], timeout: float | None, metadata: Any
        ) -> AsyncIterator[Any]:
            handler, context = self.begin(method, metadata, timeout)
            received = [
                self.receive(method, handler, request_serializer(request)) async for request in requests
            ]
            for answer in handler.stream_stream(iter(received), context):
                yield response_deserializer(handler.response_serializer(answer))

        def call(
            requests: AsyncIterable[Any], timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> _AioStream:
            return _AioStream(answers(requests, timeout, metadata))

        return call

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Callable[..., _AioPending]:
        """Make a call with many requests and one answer."""

        async def answer(requests: AsyncIterable[Any], timeout: float | None, metadata: Any) -> Any:
            handler, context = self.begin(method, metadata, timeout)
            received = [
                self.receive(method, handler, request_serializer(request)) async for request in requests
            ]
            return response_deserializer(
                handler.response_serializer(handler.stream_unary(iter(received), context))
            )

        def call(
            requests: AsyncIterable[Any], timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> _AioPending:
            return _AioPending(answer(requests, timeout, metadata))

        return call

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Callable[..., _AioStream]:
        """Make a call with one request and many answers."""

        async def answers(request: Any, timeout: float | None, metadata: Any) -> AsyncIterator[Any]:
            handler, context = self.begin(method, metadata, timeout)
            received = self.receive(method, handler, request_serializer(request))
            for answer in handler.unary_stream(received, context):
                yield response_deserializer(handler.response_serializer(answer))

        def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> _AioStream:
            return _AioStream(answers(request, timeout, metadata))

        return call

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


class _AioStream:
    def __init__(self, answers: AsyncIterator[Any]) -> None:
        self._answers = answers

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._answers

    def cancel(self) -> None:
        """Do nothing: it runs only while it is awaited."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Do nothing: no write can fail here."""


class _AioPending:
    def __init__(self, answer: Awaitable[Any]) -> None:
        self._answer = answer

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._answer.__await__()

    def cancel(self) -> None:
        """Do nothing: it runs only while it is awaited."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Do nothing: no write can fail here."""
