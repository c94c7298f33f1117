"""The layer that names every call and writes its line into the log: what, for whom, how long; never a payload."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import structlog

from deployments.gateway.interceptors.chain import Call, host_of

REQUEST_ID = "x-request-id"
# What a caller may choose as a name; anything else could forge lines of a log.
_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# Statuses that are this server's fault or its operator's business.
_TROUBLE = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}

log = structlog.stdlib.get_logger("monofacet.calls")


def request_id_of(call: Call) -> str:
    """Return the caller's own request id where it is sane, else a new one of 64 random bits."""
    for key, value in call.context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _SANE.fullmatch(value):
            return value
    return secrets.token_hex(8)


def peer_of(call: Call) -> str:
    """Return the address of who calls, without its port: the same caller has another one at each connection."""
    # One on a Unix socket has none.
    kind, _, address = host_of(call.context.peer() or "").partition(":")
    return address.strip("[]") if kind in ("ipv4", "ipv6") else kind


@asynccontextmanager
async def requests_layer(call: Call) -> AsyncIterator[None]:
    """Name the call, send the name back, bind it to every line logged meanwhile, and log the outcome."""
    call.request_id = request_id_of(call)
    call.context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
    structlog.contextvars.bind_contextvars(request_id=call.request_id)
    started = time.perf_counter()
    try:
        yield
    finally:
        fields = {
            "method": call.method,
            "code": call.code.name,
            "ms": round((time.perf_counter() - started) * 1e3, 1),
            "request_id": call.request_id,
            "peer": peer_of(call),
        }
        if call.bundle:
            fields["bundle"] = call.bundle
        if call.token is not None:
            fields["token"] = call.token.name
        if call.reason:
            fields["reason"] = call.reason
        (log.warning if call.code in _TROUBLE else log.info)("call", **fields)
