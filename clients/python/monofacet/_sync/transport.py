"""What only the synchronous client does: one channel for all threads, and how a call ends.

`_async/transport.py` has the same names; all else of ``_sync`` is generated from ``_async``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import grpc

from monofacet import _exceptions as exceptions
from monofacet._base import STUBS
from monofacet._config import Connection
from monofacet._inputs import Input
from monofacet._streaming import Ledger
from monofacet.v1 import feature_service_pb2

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


class Links:
    """A channel with its stubs, and the places of the calls in flight.

    Parameters
    ----------
    connection
        To the server.
    places
        Calls that may be in flight.
    channel
        The caller's own, or None to make one. It is not closed.
    """

    def __init__(self, connection: Connection, places: int, channel: grpc.Channel | None) -> None:
        self._given = channel
        self._channel = _open(connection) if channel is None else channel
        self.stubs: dict[type[Any], Any] = {kind: kind(self._channel) for kind in STUBS}  # type: ignore[abstract, call-arg, unused-ignore]
        self._places = threading.BoundedSemaphore(places)
        self._closed = threading.Event()

    @property
    def closed(self) -> bool:
        """Whether the client is closed."""
        return self._closed.is_set()

    def here(self) -> Links:
        """Return this: threads share a channel, which event loops do not."""
        return self

    def enter(self, seconds: float) -> bool:
        """Take a place among the calls in flight; return False if none is free in time."""
        return self._places.acquire(timeout=seconds)

    def leave(self) -> None:
        """Give the place back."""
        self._places.release()

    def wait(self, seconds: float) -> None:
        """Wait before another try; no longer than until the client is closed."""
        self._closed.wait(seconds)

    def cut(self) -> AbstractContextManager[None]:
        """Do nothing: in threads, a call whose client was closed ends with a status."""
        return contextlib.nullcontext()

    def answer(self, call: Any) -> Any:
        """Wait for the one answer of a `pending` call."""
        return call.result()

    def close(self) -> None:
        """End the waits and, if the channel is the client's own, the calls."""
        self._closed.set()
        if self._given is None:
            self._channel.close()


def _open(connection: Connection) -> grpc.Channel:
    credentials, options = connection.credentials(), connection.options()
    if credentials is None:
        return grpc.insecure_channel(connection.target, options=options)
    return grpc.secure_channel(connection.target, credentials, options=options)


@contextlib.contextmanager
def usable() -> Iterator[None]:
    """Raise a `ClosedError` where the channel was closed in the meantime, or by whoever gave it."""
    try:
        yield
    except ValueError as error:
        # gRPC's own, and its only mark.
        if "closed" not in str(error):
            raise
        raise exceptions.ClosedError from error


def blocking(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> Result:
    """Call what reads files or encodes pictures: here, as any other function."""
    return function(*arguments, **named)


def iterate(items: Iterable[Item]) -> Iterator[Item]:
    """Go over an iterable."""
    return iter(items)


def take(ledger: Ledger, item: Input | tuple[str, Input]) -> feature_service_pb2.StreamEncodeRequest | None:
    """Enter an item in the ledger of a stream; return what to send, if anything."""
    return ledger.take(item)


@contextlib.contextmanager
def uploading(
    messages: Iterator[Any],
    begin: Callable[[Iterator[Any]], Any],
    failed: Callable[[grpc.RpcError], exceptions.MonofacetError],
) -> Iterator[Any]:
    """Hold a call to which messages are sent as gRPC asks for them, and end it.

    Parameters
    ----------
    messages
        To the server.
    begin
        Begins the call.
    failed
        Makes the exception for what gRPC raises.

    Yields
    ------
    call
        What is iterated over, or has the answer. What the messages raise is raised here, when the block ends.
    """
    upload = _Upload(messages)
    call = begin(iter(upload))
    upload.started(call)
    try:
        yield call
        upload.check()
    except (grpc.RpcError, grpc.FutureCancelledError) as error:
        upload.check()
        raise failed(error) from error
    finally:
        call.cancel()


def pending(method: Any) -> Any:
    """Return what begins a call with many requests whose one answer comes later."""
    return method.future


class _Upload:
    """Runs the caller's iterable in gRPC's thread, and brings what it raises back to the caller.

    gRPC would log the exception and fail the call as UNKNOWN, which says nothing about a missing file.
    """

    def __init__(self, messages: Iterator[Any]) -> None:
        self._messages = messages
        self._call: Future[Any] = Future()
        self._failure: BaseException | None = None

    def started(self, call: Any) -> None:
        self._call.set_result(call)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._messages
        except Exception as error:
            self._failure = error
            # The thread may get here before the call was handed over.
            self._call.result().cancel()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
