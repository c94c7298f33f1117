"""A channel that calls a servicer in this process. Requests and answers go through bytes, as on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from monofacet.testing._calls import Mock


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

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Callable[..., Any]:
        """Make a call with one request and one answer."""

        def call(request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
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
    ) -> Callable[..., _Stream]:
        """Make a call with many requests and many answers."""

        def answers(requests: Iterator[Any], timeout: float | None, metadata: Any) -> Iterator[Any]:
            handler, context = self.begin(method, metadata, timeout)
            received = (self.receive(method, handler, request_serializer(request)) for request in requests)
            for answer in handler.stream_stream(received, context):
                yield response_deserializer(handler.response_serializer(answer))

        def call(
            requests: Iterator[Any], timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> _Stream:
            return _Stream(answers(requests, timeout, metadata))

        return call

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> _StreamUnary:
        """Make a call with many requests and one answer."""

        def call(requests: Iterator[Any], timeout: float | None, metadata: Any) -> Any:
            handler, context = self.begin(method, metadata, timeout)
            received = (self.receive(method, handler, request_serializer(request)) for request in requests)
            answer = handler.stream_unary(received, context)
            return response_deserializer(handler.response_serializer(answer))

        return _StreamUnary(call)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Callable[..., _Stream]:
        """Make a call with one request and many answers."""

        def answers(request: Any, timeout: float | None, metadata: Any) -> Iterator[Any]:
            handler, context = self.begin(method, metadata, timeout)
            received = self.receive(method, handler, request_serializer(request))
            for answer in handler.unary_stream(received, context):
                yield response_deserializer(handler.response_serializer(answer))

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
