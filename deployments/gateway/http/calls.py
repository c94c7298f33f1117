"""Calls that came over HTTP, run through the very layers and servicers that answer gRPC's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio

from deployments.gateway.errors import STATUS_DETAILS_KEY
from deployments.gateway.interceptors.chain import Chain
from deployments.gateway.interceptors.requests import REQUEST_ID

Headers = Sequence[tuple[bytes, bytes]]
Write = Callable[[Any], Awaitable[None]]


class CallFailed(aio.AbortError):  # type: ignore[misc]
    """A call ended with an error status.

    Parameters
    ----------
    code
        Of the status.
    status
        The rich status, with its details.
    """

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.code = code
        self.status = status
        # The fields at fault, by path.
        self.fields: list[str] = []
        self.reason = ""
        self.retry_s: float | None = None
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        for detail in status.details:
            if detail.Unpack(info):
                self.reason = info.reason
            elif detail.Unpack(bad):
                self.fields = [violation.field for violation in bad.field_violations]
            elif detail.Unpack(retry):
                self.retry_s = retry.retry_delay.ToTimedelta().total_seconds()


_STATUSES = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}


def http_status(error: CallFailed) -> int:
    """Return the HTTP status of a failure, as Connect maps codes; 413 where the request is too large."""
    if error.reason == "REQUEST_TOO_LARGE":
        return 413
    return _STATUSES.get(error.code, 500)


def answer_headers(request_id: str, error: CallFailed | None = None) -> list[tuple[bytes, bytes]]:
    """Return the headers that every answer has: the call's name, and of a failure what HTTP has a header for."""
    headers = [(REQUEST_ID.encode(), request_id.encode())] if request_id else []
    if error is not None and error.code is grpc.StatusCode.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    if error is not None and error.retry_s is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_s)).encode()))
    return headers


async def _nobody(message: Any) -> None:
    """Take an answer that nobody asked for: a unary call has none but the one that it returns."""


class HttpContext:
    """What the layers and servicers ask of gRPC's context, for a call that came over HTTP.

    Parameters
    ----------
    client
        Address and port of the caller's end of the connection; None where they are not known.
    headers
        Of the request. They are the call's metadata.
    timeout_s
        Seconds that the caller gives the call; None for as long as it takes.
    write
        Takes the answers of a stream.
    """

    def __init__(
        self,
        client: tuple[str, int] | None,
        headers: Headers,
        timeout_s: float | None = None,
        write: Write = _nobody,
    ) -> None:
        self._client = client
        self._metadata = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
        self._loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else self._loop.time() + timeout_s
        self.write = write
        self.request_id = ""

    def peer(self) -> str:
        """Return the caller's address as gRPC words it, so that limits by address count both ports' calls."""
        if self._client is None:
            return "unknown"
        host, port = self._client
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the request's headers as gRPC's metadata."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None without one."""
        return None if self._deadline is None else self._deadline - self._loop.time()

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Keep the call's name, which the answer repeats in a header."""
        self.request_id = dict(metadata).get(REQUEST_ID, "")

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        """End the call with a status.

        Raises
        ------
        CallFailed
            Always.
        """
        packed = dict(trailing).get(STATUS_DETAILS_KEY)
        status = (
            status_pb2.Status.FromString(packed)
            if packed is not None
            else status_pb2.Status(code=code.value[0], message=details)
        )
        raise CallFailed(code, status)


@dataclass(frozen=True, slots=True)
class _Details:
    """What the chain asks of gRPC's details of a call."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class Calls:
    """Runs calls of any method inside the chain.

    Parameters
    ----------
    chain
        The layers around every call.
    services
        Finds the handler of a method.
    """

    def __init__(self, chain: Chain, services: grpc.GenericRpcHandler) -> None:
        self._chain = chain
        self._services = services

    async def run(self, method: str, requests: AsyncIterator[Any], context: HttpContext) -> Any:
        """Run one call.

        Parameters
        ----------
        method
            `monofacet.v1.FeatureService/Encode`.
        requests
            Its messages as `interceptors.reading.Received`. The first is asked for once the call is admitted.
        context
            Of the call. It takes the answers of a stream.

        Returns
        -------
        The answer; None after those of a stream.

        Raises
        ------
        CallFailed
            When it ended with an error status.
        """

        async def found(details: Any) -> Any:
            return self._services.service(details)

        return await self._run(method, found, requests, context)

    async def around(
        self, method: str, answer: Callable[[], Any], requests: AsyncIterator[Any], context: HttpContext
    ) -> Any:
        """Return `answer()` to whom the chain would let call `method`, whose handler does not run.

        Raises
        ------
        CallFailed
            When the chain refuses.
        """

        async def respond(request: Any, context: Any) -> Any:
            return answer()

        async def found(details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(respond)

        return await self._run(method, found, requests, context)

    async def _run(
        self,
        method: str,
        found: Callable[[Any], Awaitable[Any]],
        requests: AsyncIterator[Any],
        context: HttpContext,
    ) -> Any:
        handler = await self._chain.intercept_service(found, _Details(f"/{method}"))
        # The chain reads every request as a stream.
        behave = handler.stream_stream or handler.stream_unary
        return await behave(requests, context)
