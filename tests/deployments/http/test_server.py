"""What a connection may cost: heads, bodies, connections, readers; and how the port closes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from deployments.gateway.http import server as module
from deployments.gateway.http.server import MAX_HEAD_BYTES, HttpServer
from deployments.operations.settings import Settings
from tests.deployments.http.conftest import ENCODE, JSON, Opened, reason_of
from tests.support.waiting import PATIENCE_S, until

REQUEST = {"inputs": [{"text": "a"}]}
HEAD = f"POST {ENCODE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(answer: Any, **overrides: Any) -> AsyncIterator[tuple[HttpServer, int]]:
    """Open the port with an application of a test's own behind it."""
    server = HttpServer(Settings(**{"port": 0, **overrides}), answer)
    port = await server.open()
    try:
        yield server, port
    finally:
        await server.close(0)


async def connected(port: int) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port)


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait until the other side closes; what it still says does not matter."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while await reader.read(65536):
                pass
    except ConnectionError:
        pass
    return True


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhost: loc"])
async def test_a_head_that_does_not_come_ends_its_connection(begun: bytes) -> None:
    async with serving(nothing, handshake_s=0.2) as (_, port):
        reader, writer = await connected(port)
        writer.write(begun)
        assert await is_closed(reader)
        writer.close()


async def test_a_second_head_that_does_not_come_ends_its_connection() -> None:
    async with serving(nothing, handshake_s=0.5) as (_, port):
        reader, writer = await connected(port)
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 204 " in await reader.readline()
        writer.write(b"GET / HT")
        assert await is_closed(reader)
        writer.close()


async def test_a_connection_between_two_requests_stays() -> None:
    async with serving(nothing, handshake_s=0.2) as (_, port):
        reader, writer = await connected(port)
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc")
            assert b" 204 " in await reader.readuntil(b"\r\n\r\n")
            # Longer than a head may take.
            await asyncio.sleep(0.5)
        writer.close()


async def test_a_head_that_is_too_long_is_refused() -> None:
    async with serving(nothing) as (_, port):
        reader, writer = await connected(port)
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (2 * MAX_HEAD_BYTES))
        assert b" 400 " in await reader.readline()
        assert await is_closed(reader)
        writer.close()


async def test_one_connection_too_many_is_closed() -> None:
    async with serving(nothing, max_connections=2) as (_, port):
        first = [await connected(port) for _ in range(2)]
        for reader, writer in first:
            writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b" 204 " in await reader.readline()
        reader, writer = await connected(port)
        assert await is_closed(reader)
        writer.close()
        for _, other in first:
            other.close()
        await asyncio.gather(*(is_closed(reader) for reader, _ in first))


async def test_what_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARGIN_S", 0.0)
    piece = b"a" * 2**20
    left: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watching = asyncio.create_task(gone(receive))
        while not watching.done():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        left.append("the stream")

    async def gone(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": piece * 64})
        left.append("the answer")

    for answer in (endless, large):
        async with serving(answer, untaken_s=0.3) as (server, port):
            _, writer = await connected(port)
            writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await until(lambda: left)
            # The connection goes, and with it what was written and not taken.
            await until(lambda: not server.connections)
            writer.close()
        left.clear()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", [ENCODE, "/v1/embeddings"])
async def test_a_body_over_the_limit_is_refused_and_counted(
    open_http: Opened, path: str, chunked: bool
) -> None:
    body = b'{"inputs": [{"text": "' + b"a" * 5_000 + b'"}]}'

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(body), 500):
            yield body[i : i + 500]

    async with open_http(max_request_bytes=4_000) as (gateway, client):
        response = await client.post(path, content=pieces() if chunked else body, headers=JSON)
        assert response.status_code == 413
        error = response.json()
        assert (error["error"]["code"] if "error" in error else reason_of(error)) == "REQUEST_TOO_LARGE"
        assert gateway.sample("monofacet_rejected_total", reason="REQUEST_TOO_LARGE") == 1
        # The connection is of use again.
        assert (await client.post(ENCODE, json=REQUEST)).status_code == 200


async def test_a_large_body_that_is_announced_is_not_waited_for(open_http: Opened) -> None:
    async with open_http(max_request_bytes=4_000) as (gateway, _):
        reader, writer = await connected(gateway.server.http_port)
        writer.write(f"{HEAD}content-length: 1000000000\r\n\r\n".encode())
        assert b" 413 " in await reader.readline()
        writer.close()


async def test_a_body_that_does_not_come_is_given_up(open_http: Opened) -> None:
    async with open_http(read_s=0.3, handshake_s=0.3) as (gateway, _):
        for path in (ENCODE, "/v1/embeddings"):
            reader, writer = await connected(gateway.server.http_port)
            writer.write(f"{HEAD.replace(ENCODE, path)}content-length: 100\r\n\r\n{{".encode())
            assert b" 429 " in await reader.readline()
            # What may still come of the body is not waited for without an end, either.
            assert await is_closed(reader)
            writer.close()
        assert gateway.sample("monofacet_rejected_total", reason="REQUEST_SLOW") == 2


async def test_calls_of_one_caller_are_bounded_over_both_ports(open_http: Opened) -> None:
    async with open_http(max_concurrent_calls=2) as (gateway, client):
        gateway.model.hold()
        first = asyncio.create_task(client.post("/v1/embeddings", json={"input": "a"}))
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=ENCODE[1:]) == 1)
        refused = await client.post(ENCODE, json=REQUEST)
        assert refused.status_code == 429 and reason_of(refused.json()) == "TOO_MANY_CALLS"
        gateway.model.release()
        assert (await first).status_code == 200


async def test_what_is_in_progress_is_finished_and_no_more_taken(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        gateway.model.hold()
        first = asyncio.create_task(client.post(ENCODE, json=REQUEST))
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=ENCODE[1:]) == 1)
        draining = asyncio.create_task(gateway.server.drain())
        await until(lambda: gateway.server._admission.closed)
        # One that came before the port closed is answered.
        with pytest.raises(ConnectionRefusedError):
            while True:
                _, writer = await connected(gateway.server.http_port)
                writer.close()
        gateway.model.release()
        assert (await first).status_code == 200
        assert await draining


async def test_a_port_that_is_taken_stops_the_start() -> None:
    async with serving(nothing) as (_, port):
        second = HttpServer(Settings(http_port=port), nothing)
        with pytest.raises(OSError, match="in use"):
            await second.open()
