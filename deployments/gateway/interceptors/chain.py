"""One gRPC interceptor that puts small layers around every kind of call.

gRPC's own interface wraps handlers, four ways each. Here a layer is one async context manager around the
call, the same for unary calls and streams, and the wrapping is done once. A server stream is written by the
wrapper itself, so that a caller who leaves is felt inside the layers and not whenever the generator happens
to be collected.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from deployments.access.tokens import Token
from deployments.batching import QueueFull
from deployments.gateway.errors import STARTING, MalformedRequest, RequestTooLarge, Starting

OURS = "/monofacet."
REFLECTION = "/grpc.reflection."


@dataclass(slots=True)
class Call:
    """One call in progress.

    Attributes
    ----------
    method
        Full name without the leading slash: `monofacet.v1.FeatureService/Encode`.
    context
        gRPC's context of the call.
    request
        The request of a unary call; None when the requests are a stream.
    streaming
        Whether requests or responses are a stream.
    code, reason
        The status so far, and the ErrorInfo reason of a failure.
    request_id
        Its name in the log.
    token
        Who calls, once known; None where the server has no tokens.
    """

    method: str
    context: Any
    request: Any
    streaming: bool
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    request_id: str = ""
    token: Token | None = None


Layer = Callable[[Call], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class _Undecoded:
    """Stands in for a request that was refused before it was decoded."""

    error: Exception


def checked_deserializer(decode: Callable[[bytes], Any], max_bytes: int) -> Callable[[bytes], Any]:
    """Return `decode` with the size checked on the wire bytes, before a message is made of them."""

    def deserialize(data: bytes) -> Any:
        if len(data) > max_bytes:
            return _Undecoded(RequestTooLarge(f"the request has {len(data)} bytes; {max_bytes} are allowed"))
        try:
            return decode(data)
        except Exception:  # protobuf raises DecodeError or ValueError by implementation
            return _Undecoded(MalformedRequest("the request cannot be decoded"))

    return deserialize


@asynccontextmanager
async def decoded_layer(call: Call) -> AsyncIterator[None]:
    """End a call whose request was refused before it was decoded; the layers within see messages only."""
    if isinstance(call.request, _Undecoded):
        raise call.request.error
    yield


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Undecoded):
            raise request.error
        yield request


async def _never(requests: Any, context: Any) -> AsyncIterator[bytes]:
    """Stand in for a method that is not served yet; a layer refuses its calls before they get here."""
    raise Starting(STARTING)
    yield b""


def refused(error: Exception) -> Any:
    """Return the handler of a call that is refused before its request is read."""

    async def refuse(requests: Any, context: Any) -> AsyncIterator[bytes]:
        # Raised again and again, it would keep the frames of every call that it has ended.
        raise error.with_traceback(None)
        yield b""

    # As a stream, so that gRPC does not wait for the request.
    return grpc.stream_stream_rpc_method_handler(refuse)


class Chain(aio.ServerInterceptor):  # type: ignore[misc]
    """Puts `layers`, outermost first, around the calls of our own services.

    Health passes untouched: it must answer whoever asks, whatever the load.

    Parameters
    ----------
    doors
        What to put around each call, as far as it needs no request: what names, counts and words what happens to a
        call, and what lets it in.
    layers
        What to put around it within those.
    max_request_bytes
        Bytes of one request message.
    reflection_layers
        What to put around reflection, which shows what there is to call.
    check
        Raises what the doors would, from the name and the metadata of a call: it is then refused inside them before
        its request is read, however large that is and whoever sends it.
    shut
        Whether a method (by its name) takes no call now because the server is overloaded. Its calls are refused inside
        `told` alone and before their requests are read: while many are refused, refusing must cost little.
    told
        The doors that name, count and word what happens to a call.
    awaited
        Names of methods (`monofacet.v1.FeatureService/Encode`) that will be served once the model is warm.
        Until then the layers refuse their calls, where gRPC alone would say that there is no such method.
    """

    def __init__(
        self,
        doors: Sequence[Layer],
        layers: Sequence[Layer],
        max_request_bytes: int,
        reflection_layers: Sequence[Layer] = (),
        awaited: Collection[str] = (),
        check: Callable[[str, Any], None] = lambda _, __: None,
        shut: Callable[[str], bool] = lambda _: False,
        told: Sequence[Layer] = (),
    ) -> None:
        self._doors = tuple(doors)
        self._layers = (*doors, *layers)
        self._max_request_bytes = max_request_bytes
        self._reflection_layers = tuple(reflection_layers)
        self._awaited = frozenset(awaited)
        self._check = check
        self._shut = shut
        self._told = tuple(told)
        self._refusing: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Return the method's handler inside the layers."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None and path[1:] in self._awaited:
            handler = grpc.stream_stream_rpc_method_handler(_never)
        if handler is None:
            return None
        if path.startswith(OURS):
            try:
                self._check(path[1:], handler_call_details.invocation_metadata)
            except Exception as error:  # the doors meet it again, and word it
                return self._wrap(refused(error), path[1:], self._doors)
            if self._shut(path[1:]):
                return self._refuse_full(path[1:])
            return self._wrap(handler, path[1:], self._layers)
        if path.startswith(REFLECTION):
            return self._wrap(handler, path[1:], self._reflection_layers)
        return handler

    def _refuse_full(self, method: str) -> Any:
        if method not in self._refusing:
            self._refusing[method] = self._wrap(refused(QueueFull()), method, self._told)
        return self._refusing[method]

    def _wrap(self, handler: Any, method: str, layers: Sequence[Layer]) -> Any:
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        streaming = handler.request_streaming or handler.response_streaming

        async def behave(request: Any, context: Any) -> Any:
            call = Call(method, context, None if handler.request_streaming else request, streaming)
            async with AsyncExitStack() as stack:
                for layer in layers:
                    await stack.enter_async_context(layer(call))
                argument = _decoded(request) if handler.request_streaming else request
                if not inspect.isasyncgenfunction(inner):
                    return await inner(argument, context)
                async with aclosing(inner(argument, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            return None

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            behave,
            request_deserializer=checked_deserializer(
                handler.request_deserializer or bytes, self._max_request_bytes
            ),
            response_serializer=handler.response_serializer,
        )
