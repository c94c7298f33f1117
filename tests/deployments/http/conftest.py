"""What the tests of the HTTP port share: a client, and what of an answer is compared."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx2
import pytest
from google.rpc import error_details_pb2

from tests.deployments.conftest import Gateway, Open
from tests.support.waiting import PATIENCE_S

Opened = Callable[..., AbstractAsyncContextManager[tuple[Gateway, httpx2.AsyncClient]]]
JSON = {"content-type": "application/json"}
ENCODE = "/monofacet.v1.FeatureService/Encode"
GENERATE = "/monofacet.v1.ImagingService/Generate"
SCORE = "/monofacet.v1.ModalityService/ScoreModality"


@pytest.fixture
def open_http(open_gateway: Open) -> Opened:
    """Return a context manager that opens a gateway with the given settings, and a client of its HTTP port."""

    @asynccontextmanager
    async def opened(**overrides: Any) -> AsyncIterator[tuple[Gateway, httpx2.AsyncClient]]:
        async with (
            open_gateway(**overrides) as gateway,
            httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{gateway.server.http_port}", timeout=PATIENCE_S, trust_env=False
            ) as client,
        ):
            yield gateway, client

    return opened


def enveloped(*messages: Any) -> bytes:
    """Return messages as a stream of the Connect protocol."""
    bodies = [json.dumps(message).encode() for message in messages]
    return b"".join(struct.pack(">BI", 0, len(body)) + body for body in bodies)


def envelopes(data: bytes) -> list[tuple[int, bytes]]:
    """Return the flags and contents of a stream of the Connect protocol or of gRPC-Web."""
    found = []
    while data:
        flags, size = struct.unpack(">BI", data[:5])
        found.append((flags, data[5 : 5 + size]))
        data = data[5 + size :]
    return found


def reason_of(error: dict[str, Any]) -> str:
    """Return the reason in an error of the Connect protocol."""
    for detail in error["details"]:
        if detail["type"] == "google.rpc.ErrorInfo":
            value = base64.b64decode(detail["value"] + "===")
            return str(error_details_pb2.ErrorInfo.FromString(value).reason)
    raise AssertionError(error)
