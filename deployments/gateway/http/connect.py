"""Connect, gRPC-Web and JSON for every call of the contract, made from its descriptors.

The library `connectrpc` speaks the protocols; what a call may do and what it answers is decided by the chain that
answers gRPC (`Exchange`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from connectrpc.code import Code
from connectrpc.errors import ConnectError, ErrorDetail
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf import json_format, message_factory
from protobuf.wkt import Any as WireAny

from deployments.gateway.errors import MalformedRequest, RequestTooLarge, StreamNeedsHttp2
from deployments.gateway.http.bodies import dumps, loads
from deployments.gateway.http.calls import CallFailed, Calls, HttpContext, answer_headers, http_status
from deployments.gateway.http.exchange import Exchange
from deployments.gateway.interceptors.reading import Received, checked_deserializer

_STREAM_TYPES = {
    (False, False): StreamType.UNARY,
    (False, True): StreamType.SERVER_STREAM,
    (True, False): StreamType.CLIENT_STREAM,
    (True, True): StreamType.BIDI_STREAM,
}


class _Binary:
    """Protocol buffers: what came is handed to the chain, which checks it as it checks gRPC's."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def name(self) -> str:
        return "proto"

    def encode(self, message: Any) -> bytes:
        data: bytes = message.SerializeToString()
        return data

    def decode(self, data: bytes | bytearray, message_class: Any) -> Any:
        return checked_deserializer(message_class.FromString, self._max_bytes)(bytes(data))


class _Json:
    """Proto3's JSON; a field that the message does not have is refused, since it is mostly a slip of the pen."""

    def name(self) -> str:
        return "json"

    def encode(self, message: Any) -> bytes:
        return dumps(json_format.MessageToDict(message))

    def decode(self, data: bytes | bytearray, message_class: Any) -> Any:
        try:
            return Received(len(data), parsed(loads(bytes(data)), message_class))
        except MalformedRequest as error:
            return Received(len(data), None, error)


def parsed(value: Any, message_class: Any) -> Any:
    """Return the message that a JSON value is.

    Raises
    ------
    MalformedRequest
        When it is none.
    """
    if not isinstance(value, dict):
        raise MalformedRequest("the body must be a JSON object")
    try:
        return json_format.ParseDict(value, message_class())
    except MalformedRequest:
        raise
    except RecursionError:
        raise MalformedRequest("the JSON is nested too deeply") from None
    except Exception as error:  # protobuf raises ParseError, and TypeError or AttributeError for some lists
        raise MalformedRequest(f"the JSON is not the request: {error}") from None


def connect_error(error: CallFailed) -> ConnectError:
    """Return the library's form of a failure, details included."""
    details = [ErrorDetail(WireAny(type_url=d.type_url, value=d.value)) for d in error.status.details]
    name = error.code.name
    return ConnectError(Code["CANCELED" if name == "CANCELLED" else name], error.status.message, details)


@dataclass(slots=True, eq=False)
class _Request:
    """One HTTP request: the call that it may become, once the library has understood its headers."""

    calls: Calls
    method: str
    context: HttpContext
    # Why its body need not be read.
    too_long: str
    exchange: Exchange | None = None
    failure: CallFailed | None = None

    @property
    def running(self) -> Exchange:
        assert self.exchange is not None
        return self.exchange

    def failed(self, error: CallFailed) -> ConnectError:
        self.failure = error
        return connect_error(error)

    async def result(self) -> Any:
        try:
            return await self.running.task
        except CallFailed as error:
            raise self.failed(error) from None


_request: ContextVar[_Request] = ContextVar("_request")


class _Admission:
    """Asks the chain before the library reads the request, and tells it of what the library cannot read."""

    async def on_start(self, ctx: Any) -> _Request:
        request = _request.get()
        request.exchange = Exchange(request.calls, request.method, request.context)
        try:
            await request.exchange.admitted()
        except CallFailed as error:
            raise request.failed(error) from None
        return request

    async def on_end(self, request: _Request, ctx: Any, error: Exception | None) -> None:
        exchange = request.running
        if exchange.task.done() or error is None:
            return
        if not isinstance(error, ConnectError) or error.code is Code.CANCELED:
            await exchange.cancel()
            return
        await exchange.give(Received(0, None, _unreadable(error)))
        try:
            await request.result()
        except ConnectError as failure:
            # The protocols ask for other codes where a stream breaks their own rules.
            if error.code in (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED):
                raise failure from None


def _unreadable(error: ConnectError) -> Exception:
    """Return why the library could not read a message, as one of the gateway's own errors."""
    kind = RequestTooLarge if error.code is Code.RESOURCE_EXHAUSTED else MalformedRequest
    return kind(error.message)


async def _unary(message: Received, ctx: Any) -> Any:
    request = _request.get()
    await request.running.give(message)
    await request.running.finish()
    return await request.result()


async def _server_stream(message: Received, ctx: Any) -> AsyncIterator[Any]:
    request = _request.get()
    exchange = request.running
    await exchange.give(message)
    await exchange.finish()
    try:
        async for answer in exchange.answers():
            yield answer
    except CallFailed as error:
        raise request.failed(error) from None
    finally:
        if not exchange.task.done():
            await exchange.cancel()


async def _client_stream(messages: AsyncIterator[Received], ctx: Any) -> Any:
    request = _request.get()
    exchange = request.running

    async def hand_over() -> None:
        try:
            async for message in messages:
                await exchange.give(message)
        except ConnectError as error:
            if error.code is Code.CANCELED:
                exchange.task.cancel()
            else:
                await exchange.give(Received(0, None, _unreadable(error)))
        else:
            await exchange.finish()

    reading = asyncio.create_task(hand_over())
    try:
        return await request.result()
    finally:
        reading.cancel()
        await asyncio.wait({reading})


async def _bidi_stream(messages: AsyncIterator[Received], ctx: Any) -> AsyncIterator[Any]:
    """Refuse: over HTTP/1.1 a caller cannot read answers before it has sent all."""
    request = _request.get()
    error = StreamNeedsHttp2("this call streams both ways, for which HTTP/1.1 has no room; make it over gRPC")
    await request.running.give(Received(0, None, error))
    yield await request.result()


_FORMS: dict[StreamType, Callable[[Any], Any]] = {
    StreamType.UNARY: lambda info: Endpoint.unary(info, _unary),
    StreamType.SERVER_STREAM: lambda info: Endpoint.server_stream(info, _server_stream),
    StreamType.CLIENT_STREAM: lambda info: Endpoint.client_stream(info, _client_stream),
    StreamType.BIDI_STREAM: lambda info: Endpoint.bidi_stream(info, _bidi_stream),
}


def _endpoints(services: Sequence[Any]) -> dict[str, Any]:
    made = {}
    for service in services:
        for method in service.methods:
            kind = _STREAM_TYPES[method.client_streaming, method.server_streaming]
            info = MethodInfo(
                name=method.name,
                service_name=service.full_name,
                input=message_factory.GetMessageClass(method.input_type),
                output=message_factory.GetMessageClass(method.output_type),
                idempotency_level=IdempotencyLevel.UNKNOWN,
                stream_type=kind,
            )
            made[f"/{service.full_name}/{method.name}"] = _FORMS[kind](info)
    return made


class _Application(ConnectASGIApplication[None]):
    @property
    def path(self) -> str:
        return ""


class ConnectCalls:
    """Answers the calls of the contract.

    Parameters
    ----------
    calls
        Runs them.
    services
        Descriptors.
    max_bytes
        Of one message.
    """

    def __init__(self, calls: Calls, services: Sequence[Any], max_bytes: int) -> None:
        self._calls = calls
        self._max_bytes = max_bytes
        self._endpoints = _endpoints(services)
        self._unbounded = {
            path for path, endpoint in self._endpoints.items()
            if endpoint.method.stream_type in (StreamType.CLIENT_STREAM, StreamType.BIDI_STREAM)
        }  # fmt: skip
        codecs: Any = [_Binary(max_bytes), _Json()]
        self._app = _Application(
            service=None,
            endpoints=lambda _: self._endpoints,
            interceptors=[_Admission()],
            read_max_bytes=max_bytes,
            codecs=codecs,
        )

    def __contains__(self, path: str) -> bool:
        return path in self._endpoints

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one HTTP request whose path is one of ours."""
        scope, timeout_s = _without_deadline(scope)
        path, headers = scope["path"], scope["headers"]
        context = HttpContext(scope["client"], headers, timeout_s)
        too_long = "" if path in self._unbounded else self._too_long(headers)
        request = _Request(self._calls, path[1:], context, too_long)
        _request.set(request)

        async def read() -> Any:
            if request.too_long:
                raise ConnectError(Code.RESOURCE_EXHAUSTED, request.too_long)
            try:
                return await request.running.read(receive)
            except CallFailed as error:
                raise request.failed(error) from None

        async def respond(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = answer_headers(context.request_id, request.failure)
                message = {**message, "headers": [*message["headers"], *added]}
                if message["status"] == HTTPStatus.TOO_MANY_REQUESTS and request.failure is not None:
                    message["status"] = http_status(request.failure)
            await send(message)

        try:
            arguments: Any = (scope, read, respond)
            await self._app(*arguments)
        finally:
            if request.exchange is not None and not request.exchange.task.done():
                await request.exchange.cancel()

    def _too_long(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """Return why a request need not be read, by the size that it announces."""
        size = int(dict(headers).get(b"content-length", b"0"))
        # A message that travels in an envelope has five bytes more.
        if size <= self._max_bytes + 5:
            return ""
        return f"the request has {size} bytes; {self._max_bytes} are allowed"


_GRPC_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def _without_deadline(scope: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Take the deadline out of the headers, for the chain; the library would cut the call off without a reason.

    One that cannot be read stays, for the library to refuse. So does no wish for a compressed answer: vectors hardly
    shrink, and the gateway has better things to do.
    """
    headers, timeout_s = [], None
    for name, value in scope["headers"]:
        if name == b"connect-timeout-ms" and value.isdigit() and len(value) <= 10:
            timeout_s = int(value) / 1000
        elif (
            name == b"grpc-timeout" and value[:-1].isdigit() and len(value) <= 9 and value[-1:] in _GRPC_UNITS
        ):
            timeout_s = int(value[:-1]) * _GRPC_UNITS[value[-1:]]
        elif name not in (b"accept-encoding", b"connect-accept-encoding", b"grpc-accept-encoding"):
            headers.append((name, value))
    return {**scope, "headers": headers}, timeout_s
