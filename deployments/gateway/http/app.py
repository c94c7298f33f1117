"""The ASGI application of the HTTP port: finds what answers a path, and refuses pages of other origins."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deployments.gateway.http.bodies import Body, CallerGone, dumps, media_type, send_json
from deployments.gateway.http.calls import CallFailed, Calls, HttpContext, answer_headers
from deployments.gateway.http.connect import ConnectCalls
from deployments.gateway.http.openai import OpenAI, error_body, send_failure
from deployments.gateway.http.openapi import description
from deployments.operations.addresses import is_loopback
from deployments.operations.settings import Settings

# What may describe the services over gRPC may do so here.
_DESCRIBE = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
# Headers that a page of another origin may send and read.
_ASKED = (
    "authorization",
    "connect-protocol-version",
    "connect-timeout-ms",
    "content-type",
    "grpc-timeout",
    "x-grpc-web",
    "x-request-id",
    "x-user-agent",
)
_SHOWN = ("grpc-message", "grpc-status", "grpc-status-details-bin", "retry-after", "x-request-id")
_GRPC = "application/grpc"

log = logging.getLogger("monofacet.gateway")


def application(
    settings: Settings, calls: Calls, services: Sequence[Any], health: Callable[[], Mapping[str, bool]]
) -> Callable[..., Any]:
    """Return the ASGI application.

    Parameters
    ----------
    settings
        Of the server.
    calls
        Runs what is asked for.
    services
        Descriptors of the contract's services.
    health
        Says which services serve, by name; the empty name is the server.
    """
    door: Callable[..., Any] = Door(settings, calls, services, health)
    if settings.http_cors_origins:
        # Here: who allows no other origins imports nothing of it.
        from starlette.middleware.cors import CORSMiddleware

        door = CORSMiddleware(
            door,
            allow_origins=settings.http_cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=_ASKED,
            expose_headers=_SHOWN,
            max_age=7_200,
        )
    return door


class Door:
    """Answers every HTTP request.

    Parameters
    ----------
    settings, calls, services, health
        As `application`'s.
    """

    def __init__(
        self,
        settings: Settings,
        calls: Calls,
        services: Sequence[Any],
        health: Callable[[], Mapping[str, bool]],
    ) -> None:
        self._settings = settings
        self._calls = calls
        self._health = health
        self._connect = ConnectCalls(calls, services, settings.max_request_bytes)
        self._openai = OpenAI(calls, settings.max_request_bytes, settings.max_items)
        self._services = services
        self._description: dict[str, Any] | None = None
        # A page that resolves its own name to this machine would be of the server's origin. It cannot do so where a
        # token is needed, nor with a certificate.
        tokens = settings.tokens_file is not None or bool(settings.tokens.strip())
        self._local_names = is_loopback(settings.host) and not tokens and settings.tls_certificate is None

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one HTTP request."""
        try:
            await self._answer(scope, receive, send)
        except CallerGone:
            log.debug("a caller went before it was answered")

    async def _answer(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        path, headers = scope["path"], scope["headers"]
        if self._local_names and not _is_local(dict(headers).get(b"host", b"")):
            message = "the Host of the request is not this machine's, and no token is needed here"
            await send_json(send, 421, _error("failed_precondition", message))
        elif path in self._connect:
            await self._answer_connect(scope, receive, send)
        elif path in self._openai:
            await self._openai(scope, receive, send)
        elif path in ("/healthz", "/readyz"):
            await self._answer_health(path, scope["method"], send)
        elif path == "/openapi.json" and self._settings.reflection:
            await self._describe(scope, receive, send)
        elif path.startswith("/v1/"):
            await send_json(send, 404, error_body(404, f"there is no {path[:200]}", code="UNKNOWN_ROUTE"))
        else:
            message = f"there is no {path[:200]}; /openapi.json lists what there is"
            await send_json(send, 404, _error("unimplemented", message))

    async def _answer_connect(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        headers = scope["headers"]
        kind = media_type(headers)
        if kind == _GRPC or kind.startswith(f"{_GRPC}+"):
            message = (
                f"gRPC needs HTTP/2, which port {self._settings.port} speaks; here are Connect and gRPC-Web"
            )
            await send_json(send, 415, _error("unimplemented", message))
        elif not all(_readable(value) for _, value in headers):
            await send_json(send, 400, _error("invalid_argument", "a header is not UTF-8"))
        else:
            await self._connect(scope, receive, send)

    async def _answer_health(self, path: str, method: str, send: Any) -> None:
        """Say how the services are: 200 at /healthz as long as anybody answers, at /readyz only while serving."""
        if method not in ("GET", "HEAD"):
            await send_json(
                send, 405, _error("unimplemented", f"{path} takes GET"), [(b"allow", b"GET, HEAD")]
            )
            return
        serving = self._health()
        words = {name: "SERVING" if up else "NOT_SERVING" for name, up in serving.items()}
        body = dumps({"status": words.pop(""), "services": words})
        await send_json(send, 200 if serving[""] or path == "/healthz" else 503, body)

    async def _describe(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Describe the routes, to whom reflection would describe the services."""
        if scope["method"] not in ("GET", "HEAD"):
            said = _error("unimplemented", "/openapi.json takes GET")
            await send_json(send, 405, said, [(b"allow", b"GET, HEAD")])
            return
        context = HttpContext(scope["client"], scope["headers"])
        body = Body(receive, scope["headers"], 0)
        body.ended.set()
        empty = body.empty()
        try:
            made = await body.unless_gone(self._calls.around(_DESCRIBE, self._described, empty, context))
        except CallFailed as error:
            await send_failure(send, error, context.request_id)
            return
        await send_json(send, 200, dumps(made), answer_headers(context.request_id))

    def _described(self) -> dict[str, Any]:
        if self._description is None:
            self._description = description(self._services)
        return self._description


def _error(code: str, message: str) -> bytes:
    """Return an error in Connect's shape."""
    return dumps({"code": code, "message": message})


def _readable(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_local(host: bytes) -> bool:
    """Return whether a Host header names an address, or this machine as everybody does."""
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
