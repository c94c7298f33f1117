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
import stamina
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._base import BaseClient, Batcher, Deadline, is_small, split_within
from monofacet._config import TLS, Retry, Timeout
from monofacet._inputs import Input, to_inputs
from monofacet._status import error_from_rpc, shift_violations
from monofacet.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc

Item = TypeVar("Item")


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
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        super().__init__(
            target, token=token, tls=tls, timeout=timeout, retry=retry, channel=channel, bundle=bundle
        )
        # Read now, so that a wrong path fails here and not in the first call.
        self._credentials = self._connection.credentials()
        self._channel = channel
        self._stubs: dict[type[Any], Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls in progress fail."""
        if self._channel is not None and self._given_channel is None and self._owner is None:
            await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        options = self._connection.options()
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.target, options=options)
        return grpc.aio.secure_channel(self.target, self._credentials, options=options)

    # The stubs' types are those of a synchronous channel: that they are awaited is known here only.
    def _stub(self, kind: type[Any]) -> Any:
        if self._owner is not None:
            return self._owner._stub(kind)
        if self._channel is None:
            # A channel belongs to the loop that it is made in: the first call's, not the constructor's.
            self._channel = self._open()
        if kind not in self._stubs:
            self._stubs[kind] = kind(self._channel)
        return self._stubs[kind]

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Any, timeout: float | None) -> Any:
        deadline = Deadline(self._timeout.call if timeout is None else timeout)
        self._addressed(request)
        async for attempt in stamina.retry_context(**self._retrying(deadline)):
            with attempt:
                try:
                    return await method(request, timeout=deadline.left(), metadata=self._metadata)
                except grpc.RpcError as error:
                    raise error_from_rpc(error) from error
        raise exceptions.ServerError("no try was made", code="UNKNOWN")  # unreachable: attempts is at least 1

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
        call = method(aiter(upload), timeout=deadline.left(), metadata=self._metadata)
        ending = Ending(call)
        try:
            response = await call
            upload.check()
        except grpc.RpcError as error:
            upload.check()
            raise await ending.explain(error) from error
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

    async def explain(self, error: grpc.RpcError) -> exceptions.CallError:
        """Make the exception for a failed call.

        Parameters
        ----------
        error
            What gRPC raised.

        Returns
        -------
        CallError
            Of the server's status, if there is one.
        """
        call: Any = error
        if _is_of_a_failed_write(call.code(), call.trailing_metadata()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), _STATUS_FOLLOWS_S)
            return error_from_rpc(self._status or error)
        return error_from_rpc(error)


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
