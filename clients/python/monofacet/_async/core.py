"""What all calls of the asyncio client go through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._async.links import Link, Links
from monofacet._base import BaseClient, Batcher, Deadline, Tries, is_small, split_within
from monofacet._config import MAX_IN_FLIGHT, TLS, Retry, Timeout
from monofacet._inputs import Input, to_inputs
from monofacet._status import shift_violations
from monofacet.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc

Item = TypeVar("Item")
Response = TypeVar("Response")


class AsyncCore(BaseClient):
    """The channel, and a call with its deadline and retries."""

    def __init__(
        self,
        target: str = "localhost:9000",
        *,
        token: str | None = None,
        tls: TLS | bool | None = None,
        timeout: Timeout | float | None = None,
        retry: Retry | None = None,
        bundle: str = "",
        max_in_flight: int = MAX_IN_FLIGHT,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        super().__init__(
            target,
            token=token,
            tls=tls,
            timeout=timeout,
            retry=retry,
            bundle=bundle,
            max_in_flight=max_in_flight,
            channel=channel,
        )
        # Read now, so that a wrong path fails here and not in the first call.
        self._credentials = self._connection.credentials()
        self._links = Links(lambda: Link(channel or self._open(), max_in_flight), owned=channel is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls in progress, and all later ones, raise a `ClosedError`."""
        if self._is_owner:
            await self._links.close()

    def _open(self) -> grpc.aio.Channel:
        options = self._connection.options()
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.target, options=options)
        return grpc.aio.secure_channel(self.target, self._credentials, options=options)

    def _stub(self, kind: type[Any]) -> Any:
        return self._links.here().stubs[kind]

    def _begin(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:
        """Start a call; return what is awaited or iterated over."""
        if self._links.closed:
            raise exceptions.ClosedError
        try:
            return method(request, timeout=deadline.left(), metadata=self._metadata)
        except grpc.aio.UsageError as error:
            # gRPC's own, for a channel that was closed by whoever gave it.
            raise exceptions.ClosedError from error

    def _failed(self, error: grpc.RpcError) -> exceptions.MonofacetError:
        return self._failure(error, self._links.closed)

    @contextlib.contextmanager
    def _cut(self) -> Iterator[None]:
        """Tell the end of a call whose client was closed, which gRPC cancels, from a cancellation of the caller."""
        try:
            yield
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self._links.closed or (task is not None and task.cancelling()):
                raise
            raise exceptions.ClosedError("the client was closed while the call ran") from error

    async def _again(self, attempt: Callable[[], Awaitable[Response]], deadline: Deadline) -> Response:
        """Try until there is an answer, or an error that another try would not mend."""
        tries = Tries(self._retry, deadline)
        link = self._links.here()
        while True:
            try:
                return await attempt()
            except exceptions.CallError as error:
                wait = tries.wait(error)
                if wait is None:
                    raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.closed.wait(), wait)

    async def _next(self, answers: AsyncIterator[Any]) -> Any:
        """Return the next answer of a stream; None at its end."""
        with self._cut():
            return await anext(answers, None)

    @contextlib.asynccontextmanager
    async def _place(self, deadline: Deadline) -> AsyncIterator[None]:
        """Wait for a place among the calls in flight, and hold it."""
        places = self._links.here().places
        try:
            async with asyncio.timeout(deadline.left()):
                await places.acquire()
        except TimeoutError:
            self._no_place(deadline)
        try:
            yield
        finally:
            places.release()

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Any, timeout: float | None) -> Any:
        deadline = Deadline(self._timeout.call if timeout is None else timeout)
        self._addressed(request)
        async with self._place(deadline):
            return await self._again(lambda: self._once(method, request, deadline), deadline)

    async def _once(self, method: Callable[..., Awaitable[Any]], request: Any, deadline: Deadline) -> Any:
        """Make a call with one answer, once."""
        try:
            with self._cut():
                return await self._begin(method, request, deadline)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    async def _in_parts(
        self,
        inputs: Input | Iterable[Input],
        method: Callable[..., Awaitable[Any]],
        request: Callable[[Sequence[common_pb2.Input]], Message],
        timeout: float | None,
        *,
        field: str = "inputs",
        reserved: int = 0,
    ) -> tuple[list[Any], list[int]]:
        """Send a batch as one request or several; return the answers, and how many inputs each is for."""
        # Labels, or the features of an ablation: every part repeats them.
        besides = self._addressed(request([])).ByteSize()
        # Files are read and images encoded in a thread: both would hold up the loop.
        batch = await asyncio.to_thread(to_inputs, inputs)
        small = is_small(batch, reserved, besides)
        parts = [batch] if small else split_within(batch, await self._server_limits(), reserved, besides)
        answers = []
        offset = 0
        for part in parts:
            try:
                answers.append(await self._call(method, request(part), timeout))
            except exceptions.CallError as error:
                raise shift_violations(error, field, offset) from error.__cause__
            offset += len(part)
        return answers, [len(part) for part in parts]

    async def _upload(
        self,
        method: Any,
        first: Message,
        batcher: Batcher,
        items: Iterable[Any] | AsyncIterable[Any],
        timeout: float | None,
    ) -> Any:
        """Send a message and then the items, as gRPC asks for them; return the one answer."""
        deadline = Deadline(self._timeout.stream if timeout is None else timeout)

        async def messages() -> AsyncIterator[Message]:
            yield self._addressed(first)
            async for item in iterate(items):
                for message in await asyncio.to_thread(batcher.add, item):
                    yield message
            for message in batcher.rest():
                yield message

        upload = Upload(messages())
        call = self._begin(method, aiter(upload), deadline)
        ending = Ending(call)
        try:
            with self._cut():
                response = await call
            upload.check()
        except grpc.RpcError as error:
            upload.check()
            raise self._failed(await ending.settle(error)) from error
        except asyncio.CancelledError:
            upload.check()
            raise
        finally:
            call.cancel()
        return response

    async def _server_limits(self) -> types.Limits | None:
        if self._limits is None:
            method = self._stub(model_service_pb2_grpc.ModelServiceStub).GetModel
            try:
                response = await self._call(method, model_service_pb2.GetModelRequest(), None)
            except exceptions.UnsupportedError:
                return None
            self._limits = responses.limits(response.model.limits)
        return self._limits


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


class Upload:
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
