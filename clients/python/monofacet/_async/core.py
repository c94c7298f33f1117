"""What all calls of the asyncio client go through."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._async.transport import Links, blocking, iterate, pending, uploading, usable
from monofacet._base import BaseClient, Batcher, Deadline, Tries, is_small, split_within
from monofacet._config import MAX_IN_FLIGHT, TLS, Retry, Timeout
from monofacet._convert import read
from monofacet._inputs import Input, to_inputs
from monofacet._status import shift_violations
from monofacet.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc

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
        self._links = Links(self._connection, max_in_flight, channel)

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

    def _stub(self, kind: type[Any]) -> Any:
        return self._links.here().stubs[kind]

    def _begin(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:
        """Start a call; return what is awaited or iterated over."""
        if self._links.closed:
            raise exceptions.ClosedError
        try:
            with usable():
                return method(request, timeout=deadline.left(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def _failed(self, error: grpc.RpcError) -> exceptions.MonofacetError:
        return self._failure(error, self._links.closed)

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
            await link.wait(wait)

    async def _next(self, answers: AsyncIterator[Any]) -> Any:
        """Return the next answer of a stream; None at its end."""
        with self._links.cut():
            return await anext(answers, None)

    @contextlib.asynccontextmanager
    async def _place(self, deadline: Deadline) -> AsyncIterator[None]:
        """Wait for a place among the calls in flight, and hold it."""
        link = self._links.here()
        if not await link.enter(deadline.left()):
            self._no_place(deadline)
        try:
            yield
        finally:
            link.leave()

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Any, timeout: float | None) -> Any:
        deadline = Deadline(self._timeout.call if timeout is None else timeout)
        self._addressed(request)
        async with self._place(deadline):
            return await self._again(lambda: self._once(method, request, deadline), deadline)

    async def _once(self, method: Callable[..., Awaitable[Any]], request: Any, deadline: Deadline) -> Any:
        """Make a call with one answer, once."""
        try:
            with self._links.cut():
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
        batch = await blocking(to_inputs, inputs)
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
                for message in await blocking(batcher.add, item):
                    yield message
            for message in batcher.rest():
                yield message

        def begin(sent: AsyncIterator[Message]) -> Any:
            return self._begin(pending(method), sent, deadline)

        async with uploading(messages(), begin, self._failed) as call:
            return await self._links.answer(call)

    async def _server_limits(self) -> types.Limits | None:
        if self._limits is None:
            method = self._stub(model_service_pb2_grpc.ModelServiceStub).GetModel
            try:
                response = await self._call(method, model_service_pb2.GetModelRequest(), None)
            except exceptions.UnsupportedError:
                return None
            self._limits = read(types.Limits, response.model.limits)
        return self._limits
