"""One gRPC interceptor that puts small layers around every kind of call.

gRPC's own interface wraps handlers, four ways each. Here a layer is one async context manager around the
call, the same for unary calls and streams, and the wrapping is done once. A server stream is written by the
wrapper itself, so that a caller who leaves is felt inside the layers and not whenever the generator happens
to be collected.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
from grpc import aio

from deployments.access.tokens import Token
from deployments.gateway.errors import STARTING, AnswerNotTaken, Starting


@dataclass(slots=True, eq=False)
class Call:
    """One call in progress.

    Attributes
    ----------
    method
        Full name without the leading slash: `monofacet.v1.FeatureService/Encode`.
    context
        gRPC's context of the call.
    requests
        Its messages, unread as long as no layer reads them.
    client_streaming, streaming
        Whether requests are a stream; whether requests or responses are.
    request
        The request of a unary call, once it is read; None when the requests are a stream.
    code, reason
        The status so far, and the ErrorInfo reason of a failure.
    request_id
        Its name in the log.
    token
        Who calls, once known; None where the server has no tokens.
    bundle
        Id of the bundle that the call is for, once known.
    """

    method: str
    context: Any
    requests: AsyncIterator[Any]
    client_streaming: bool
    streaming: bool
    request: Any = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    request_id: str = ""
    token: Token | None = None
    bundle: str = ""

    @property
    def caller(self) -> str:
        """Name of the token's holder, or the peer's address: with whom the others share by halves."""
        return f"token {self.token.name}" if self.token is not None else host_of(self.context.peer())


# Who makes the call that the current task is about, for what shares itself between callers.
current_caller: ContextVar[str] = ContextVar("current_caller", default="")


def host_of(peer: str) -> str:
    """Return the address of a peer without its port: `ipv4:127.0.0.1` of `ipv4:127.0.0.1:50312`."""
    kind, _, rest = unquote(peer).partition(":")
    return f"{kind}:{rest.rpartition(':')[0]}" if kind in ("ipv4", "ipv6") else peer


# The call that this task answers: what lies within the layers can add to what is told of it.
current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)

Layer = Callable[[Call], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Group:
    """What happens around the calls of some services.

    Attributes
    ----------
    layers
        Outermost first. One of them reads the request; what stands before it refuses a call unread.
    deserializer
        Makes what that layer takes of a method's own deserializer.
    """

    layers: Sequence[Layer]
    deserializer: Callable[[Callable[[bytes], Any]], Callable[[bytes], Any]]


async def _never(requests: Any, context: Any) -> AsyncIterator[bytes]:
    """Stand in for a method that is not served yet; a layer refuses its calls before they get here."""
    raise Starting(STARTING)
    yield b""


def _forget(error: BaseException | None) -> None:
    """Drop what the frames hold that an error has left, and the errors before it.

    gRPC keeps the error of an aborted call in a circle with the call's context until the garbage collector comes; the
    request would stay with it, after it was counted as gone.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class Chain(aio.ServerInterceptor):  # type: ignore[misc]
    """Puts layers around all calls.

    gRPC reads the request of a unary call before it calls its handler. So every handler is one of a stream here,
    and the layers decide whether and when a request is read.

    Parameters
    ----------
    groups
        By what the names of their services begin with: `monofacet.`. Calls of others pass untouched.
    awaited
        Names of methods (`monofacet.v1.FeatureService/Encode`) that will be served once the model is warm.
        Until then the layers refuse their calls, where gRPC alone would say that there is no such method.
    untaken_s
        Seconds in which a caller must take an answer of a stream.
    """

    def __init__(
        self, groups: Mapping[str, Group], awaited: Collection[str] = (), untaken_s: float | None = None
    ) -> None:
        self._groups = dict(groups)
        self._awaited = frozenset(awaited)
        self._untaken_s = untaken_s

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Return the method's handler inside the layers."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method[1:]
        if handler is None and method in self._awaited:
            handler = grpc.stream_stream_rpc_method_handler(_never)
        if handler is None:
            return None
        for prefix, group in self._groups.items():
            if method.startswith(prefix):
                return self._wrap(handler, method, group)
        return handler

    def _wrap(self, handler: Any, method: str, group: Group) -> Any:
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        client_streaming, streaming = (
            handler.request_streaming,
            handler.request_streaming or handler.response_streaming,
        )

        async def behave(requests: Any, context: Any) -> Any:
            call = Call(method, context, requests, client_streaming, streaming)
            current_call.set(call)
            argument: Any = None
            try:
                async with AsyncExitStack() as stack:
                    for layer in group.layers:
                        await stack.enter_async_context(layer(call))
                    current_caller.set(call.caller)
                    argument = call.requests if client_streaming else call.request
                    if not inspect.isasyncgenfunction(inner):
                        return await inner(argument, context)
                    async with aclosing(inner(argument, context)) as responses:
                        async for response in responses:
                            await self._write(context, response)
            except BaseException as error:
                call.request = argument = None
                _forget(error)
                raise
            return None

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(
            behave,
            request_deserializer=group.deserializer(handler.request_deserializer or bytes),
            response_serializer=handler.response_serializer,
        )

    async def _write(self, context: Any, response: Any) -> None:
        try:
            async with asyncio.timeout(self._untaken_s):
                await context.write(response)
        except TimeoutError:
            raise AnswerNotTaken(f"an answer was not taken for {self._untaken_s:g} s") from None
