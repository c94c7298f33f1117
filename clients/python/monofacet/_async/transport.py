"""What only the asyncio client does: channels for each event loop, what blocks in threads, how a call ends.

`_sync/transport.py` has the same names; all else of ``_sync`` is generated from ``_async``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any, Generic, ParamSpec, TypeVar

import grpc

from monofacet import _exceptions as exceptions
from monofacet import _requests as requests
from monofacet._base import STUBS
from monofacet._config import Connection
from monofacet._inputs import Input
from monofacet._streaming import Ledger
from monofacet.v1 import feature_service_pb2

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


class Link:
    """A channel with its stubs, and the places of the calls in flight, in one event loop.

    Parameters
    ----------
    channel
        To the server.
    places
        Calls that may be in flight.
    """

    def __init__(self, channel: grpc.aio.Channel, places: int) -> None:
        # The stubs' types are those of a synchronous channel: that they are awaited is known here only.
        self.stubs: dict[type[Any], Any] = {kind: kind(channel) for kind in STUBS}  # type: ignore[abstract, call-arg, unused-ignore]
        self._channel = channel
        self._places = asyncio.BoundedSemaphore(places)
        self._closed = asyncio.Event()

    async def enter(self, seconds: float) -> bool:
        """Take a place among the calls in flight; return False if none is free in time."""
        try:
            async with asyncio.timeout(seconds):
                return await self._places.acquire()
        except TimeoutError:
            return False

    def leave(self) -> None:
        """Give the place back."""
        self._places.release()

    async def wait(self, seconds: float) -> None:
        """Wait before another try; no longer than until the client is closed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)

    async def close(self, owned: bool) -> None:
        """End the waits and, if the channel is the client's own, the calls."""
        self._closed.set()
        if owned:
            await self._channel.close()


class Links:
    """The links of a client, one for each event loop that it is used in: a channel serves no other loop than its own.

    Parameters
    ----------
    connection
        To the server.
    places
        Calls that may be in flight, in each loop.
    channel
        The caller's own, or None to make them. It is not closed.
    """

    def __init__(self, connection: Connection, places: int, channel: grpc.aio.Channel | None) -> None:
        self.closed = False
        self._connection = connection
        self._places = places
        self._given = channel
        # Read now, so that a wrong path fails here and not in the first call.
        self._credentials = connection.credentials()
        self._lock = threading.Lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = (
            weakref.WeakKeyDictionary()
        )

    def _open(self) -> grpc.aio.Channel:
        target, options = self._connection.target, self._connection.options()
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, self._credentials, options=options)

    def here(self) -> Link:
        """Return the link of the running loop, made when it is first asked for.

        Raises
        ------
        ClosedError
            If the client is closed.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.closed:
                raise exceptions.ClosedError
            if loop not in self._by_loop:
                # Those of loops that ended hold a connection each.
                for other in [other for other in self._by_loop if other.is_closed()]:
                    del self._by_loop[other]
                self._by_loop[loop] = Link(self._given or self._open(), self._places)
            return self._by_loop[loop]

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Tell the end of a call whose client was closed, which gRPC cancels, from a cancellation of the caller."""
        try:
            yield
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self.closed or (task is not None and task.cancelling()):
                raise
            raise exceptions.ClosedError("the client was closed while the call ran") from error

    async def answer(self, call: Any) -> Any:
        """Wait for the one answer of a `pending` call."""
        with self.cut():
            return await call

    async def close(self) -> None:
        """Close all links."""
        with self._lock:
            self.closed = True
            links = dict(self._by_loop)
            self._by_loop.clear()
        owned = self._given is None
        here = asyncio.get_running_loop()
        for loop, link in links.items():
            if loop is here:
                await link.close(owned)
            elif loop.is_running():
                # Of another thread. Waited for, so that its calls have ended when this returns.
                closing = asyncio.run_coroutine_threadsafe(link.close(owned), loop)
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wrap_future(closing)


@contextlib.contextmanager
def usable() -> Iterator[None]:
    """Raise a `ClosedError` where the channel was closed by whoever gave it."""
    try:
        yield
    except grpc.aio.UsageError as error:
        raise exceptions.ClosedError from error


class blocking(Generic[Result]):
    """Calls what reads files or encodes pictures, in a thread when it is awaited: it would hold up the loop.

    Parameters
    ----------
    function
        What blocks.
    *arguments, **named
        Of the function.
    """

    def __init__(
        self,
        function: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **named: Parameters.kwargs,
    ) -> None:
        self._begin: Callable[[], Coroutine[Any, Any, Result]] = lambda: asyncio.to_thread(
            function, *arguments, **named
        )

    def __await__(self) -> Generator[Any, Any, Result]:
        return self._begin().__await__()


async def iterate(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    """Go over either kind of iterable.

    Parameters
    ----------
    items
        Asynchronous, or not; then, unless it is a sequence, each step runs in a thread, since it may read files.

    Yields
    ------
    object
        The items.
    """
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    if isinstance(items, Sequence):
        for item in items:
            yield item
        return
    iterator = iter(items)
    # A StopIteration cannot cross a future, so the end is a value.
    end = object()
    while (item := await asyncio.to_thread(_step, iterator, end)) is not end:
        yield item


def _step(iterator: Iterator[Any], end: object) -> Any:
    return next(iterator, end)


async def take(
    ledger: Ledger, item: Input | tuple[str, Input]
) -> feature_service_pb2.StreamEncodeRequest | None:
    """Enter an item in the ledger of a stream; return what to send, if anything."""
    # A hop to a thread for each text would cost more than the text.
    _, value = requests.stream_item(0, item)
    return ledger.take(item) if isinstance(value, str | bytes) else await blocking(ledger.take, item)


@contextlib.asynccontextmanager
async def uploading(
    messages: AsyncIterator[Any],
    begin: Callable[[AsyncIterator[Any]], Any],
    failed: Callable[[grpc.RpcError], exceptions.MonofacetError],
) -> AsyncIterator[Any]:
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
        What is awaited or iterated over. What the messages raise is raised here, when the block ends.
    """
    upload = _Upload(messages)
    call = begin(aiter(upload))
    ending = Ending(call)
    try:
        yield call
        upload.check()
    except grpc.RpcError as error:
        upload.check()
        raise failed(await ending.settle(error)) from error
    except asyncio.CancelledError:
        upload.check()
        raise
    finally:
        call.cancel()


def pending(method: Any) -> Any:
    """Return what begins a call with many requests whose one answer comes later."""
    return method


class _Upload:
    """Runs the caller's iterable as gRPC asks for it, and brings what it raises back to the caller.

    gRPC would cancel the call, which looks like a cancellation of the caller.
    """

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self._failure: BaseException | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._messages:
                yield message
        except Exception as error:
            self._failure = error
            raise

    def check(self) -> None:
        """Raise what the iterable raised, if anything."""
        if self._failure is not None:
            raise self._failure


# Seconds for the status to arrive after a write has failed because of it: they come from the same packet.
_STATUS_FOLLOWS_S = 1.0


class Ending:
    """Keeps the status that the server ended a streaming call with.

    If the server ends a call while the client still sends, a write fails, and grpc.aio then puts INTERNAL in the
    place of the server's status (grpc/grpc#36066), whichever comes first: why the call was refused would be lost.

    Parameters
    ----------
    call
        Of grpc.aio, just begun.
    """

    def __init__(self, call: Any) -> None:
        self._status: grpc.aio.AioRpcError | None = None
        self._arrived = asyncio.Event()
        call.add_done_callback(self._keep)

    def _keep(self, call: Any) -> None:
        # Called for each status that is set, the one that stands for a failed write too; nothing in it may wait.
        code, trailing = _at_once(call.code()), _at_once(call.trailing_metadata())
        if self._status is None and not _is_of_a_failed_write(code, trailing):
            initial = _at_once(call.initial_metadata()) or grpc.aio.Metadata()
            self._status = grpc.aio.AioRpcError(
                code, initial, trailing or grpc.aio.Metadata(), _at_once(call.details())
            )
            self._arrived.set()

    async def settle(self, error: grpc.RpcError) -> grpc.RpcError:
        """Choose what a failed call is known by.

        Parameters
        ----------
        error
            What gRPC raised.

        Returns
        -------
        grpc.RpcError
            With the server's status, if there is one.
        """
        call: Any = error
        if _is_of_a_failed_write(call.code(), call.trailing_metadata()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), _STATUS_FOLLOWS_S)
            return self._status or error
        return error


def _is_of_a_failed_write(code: grpc.StatusCode, trailing: Any) -> bool:
    return code is grpc.StatusCode.INTERNAL and not trailing


def _at_once(value: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns without waiting; None if it would wait."""
    try:
        value.send(None)
    except StopIteration as end:
        return end.value
    value.close()
    return None
