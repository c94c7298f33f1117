"""Channels that call a servicer in this process. Requests and answers go through bytes, as on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from monofacet.testing._calls import Mock, MockContext


class _Method:
    """One method of the servicer, between the messages of the client and those of the server.

    Parameters
    ----------
    mock
        The channel.
    path
        Of the method.
    request_serializer, response_deserializer
        The client's.
    """

    def __init__(
        self,
        mock: Mock,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        *_: Any,
        **__: Any,
    ) -> None:
        self._mock, self._path = mock, path
        self._serialize, self._deserialize = request_serializer, response_deserializer

    def begin(self, timeout: float | None, metadata: Any) -> _Call:
        return _Call(self, *self._mock.begin(self._path, metadata, timeout))

    def request(self, handler: Any, request: Any) -> Any:
        return self._mock.receive(self._path, handler, self._serialize(request))

    def answer(self, handler: Any, answer: Any) -> Any:
        return self._deserialize(handler.response_serializer(answer))


class _Call(NamedTuple):
    """One call, which the server has begun."""

    method: _Method
    handler: Any
    context: MockContext

    def received(self, requests: Iterator[Any]) -> Iterator[Any]:
        """Yield the requests as the server reads them, each when it is asked for."""
        return (self.method.request(self.handler, request) for request in requests)

    async def all_received(self, requests: AsyncIterable[Any]) -> Iterator[Any]:
        return iter([self.method.request(self.handler, request) async for request in requests])

    def one(self, answers: Callable[[Any, MockContext], Any], received: Any) -> Any:
        return self.method.answer(self.handler, answers(received, self.context))

    def many(self, answers: Callable[[Any, MockContext], Iterator[Any]], received: Any) -> Iterator[Any]:
        for answer in answers(received, self.context):
            yield self.method.answer(self.handler, answer)


class MockChannel(Mock, grpc.Channel):  # type: ignore[misc]
    """A `grpc.Channel` to a servicer in this process, for `Client`.

    Streams run in the caller's thread: each answer is made when it is asked for.

    Parameters
    ----------
    service
        What answers. Default a new `FakeMonofacet`.

    Attributes
    ----------
    service
        What answers.
    calls
        Method path and request of each message that was sent, in order; the request of a call that was made
        to fail is None.
    metadata, timeouts
        Of each call, in order.
    """

    def unary_unary(self, method: str, *codec: Any, **named: Any) -> Callable[..., Any]:
        """Make a call with one request and one answer."""
        path = _Method(self, method, *codec, **named)

        def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            begun = path.begin(timeout, metadata)
            return begun.one(begun.handler.unary_unary, path.request(begun.handler, request))

        return call

    def stream_stream(self, method: str, *codec: Any, **named: Any) -> Callable[..., _Stream]:
        """Make a call with many requests and many answers."""
        path = _Method(self, method, *codec, **named)

        def answers(requests: Iterator[Any], timeout: float | None, metadata: Any) -> Iterator[Any]:
            begun = path.begin(timeout, metadata)
            yield from begun.many(begun.handler.stream_stream, begun.received(requests))

        def call(
            requests: Iterator[Any], timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> _Stream:
            return _Stream(answers(requests, timeout, metadata))

        return call

    def stream_unary(self, method: str, *codec: Any, **named: Any) -> _StreamUnary:
        """Make a call with many requests and one answer."""
        path = _Method(self, method, *codec, **named)

        def call(requests: Iterator[Any], timeout: float | None, metadata: Any) -> Any:
            begun = path.begin(timeout, metadata)
            return begun.one(begun.handler.stream_unary, begun.received(requests))

        return _StreamUnary(call)

    def unary_stream(self, method: str, *codec: Any, **named: Any) -> Callable[..., _Stream]:
        """Make a call with one request and many answers."""
        path = _Method(self, method, *codec, **named)

        def answers(request: Any, timeout: float | None, metadata: Any) -> Iterator[Any]:
            begun = path.begin(timeout, metadata)
            yield from begun.many(begun.handler.unary_stream, path.request(begun.handler, request))

        def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> _Stream:
            return _Stream(answers(request, timeout, metadata))

        return call

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """Do nothing: a mock is always connected."""

    def unsubscribe(self, callback: Any) -> None:
        """Do nothing: a mock is always connected."""

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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

    def unary_unary(self, method: str, *codec: Any, **named: Any) -> Callable[..., Awaitable[Any]]:
        """Make a call with one request and one answer."""
        path = _Method(self, method, *codec, **named)

        async def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            begun = path.begin(timeout, metadata)
            return begun.one(begun.handler.unary_unary, path.request(begun.handler, request))

        return call

    def stream_stream(self, method: str, *codec: Any, **named: Any) -> Callable[..., _AioStream]:
        """Make a call with many requests and many answers."""
        path = _Method(self, method, *codec, **named)

        async def answers(
            requests: AsyncIterable[Any], timeout: float | None, metadata: Any
        ) -> AsyncIterator[Any]:
            begun = path.begin(timeout, metadata)
            for answer in begun.many(begun.handler.stream_stream, await begun.all_received(requests)):
                yield answer

        def call(
            requests: AsyncIterable[Any], timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> _AioStream:
            return _AioStream(answers(requests, timeout, metadata))

        return call

    def stream_unary(self, method: str, *codec: Any, **named: Any) -> Callable[..., _AioPending]:
        """Make a call with many requests and one answer."""
        path = _Method(self, method, *codec, **named)

        async def answer(requests: AsyncIterable[Any], timeout: float | None, metadata: Any) -> Any:
            begun = path.begin(timeout, metadata)
            return begun.one(begun.handler.stream_unary, await begun.all_received(requests))

        def call(
            requests: AsyncIterable[Any], timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> _AioPending:
            return _AioPending(answer(requests, timeout, metadata))

        return call

    def unary_stream(self, method: str, *codec: Any, **named: Any) -> Callable[..., _AioStream]:
        """Make a call with one request and many answers."""
        path = _Method(self, method, *codec, **named)

        async def answers(request: Any, timeout: float | None, metadata: Any) -> AsyncIterator[Any]:
            begun = path.begin(timeout, metadata)
            for answer in begun.many(begun.handler.unary_stream, path.request(begun.handler, request)):
                yield answer

        def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> _AioStream:
            return _AioStream(answers(request, timeout, metadata))

        return call

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


class _Stream:
    """The answers of a stream, which can be cancelled."""

    def __init__(self, answers: Iterator[Any]) -> None:
        self._answers = answers
        self._cancelled = False

    def __iter__(self) -> Iterator[Any]:
        for answer in self._answers:
            if self._cancelled:
                return
            yield answer

    def cancel(self) -> None:
        self._cancelled = True


class _StreamUnary:
    """A call with many requests and one answer, now or later."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(
        self, requests: Iterator[Any], timeout: float | None = None, metadata: Any = None, **_: Any
    ) -> Any:
        return self._call(requests, timeout, metadata)

    def future(
        self, requests: Iterator[Any], timeout: float | None = None, metadata: Any = None, **_: Any
    ) -> _Pending:
        return _Pending(lambda: self._call(requests, timeout, metadata))


class _Pending:
    """An answer that is made when it is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def result(self) -> Any:
        return self._make()

    def cancel(self) -> None:
        """Do nothing: it is not running."""


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
