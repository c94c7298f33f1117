"""Requests and answers that are plain JSON over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.gateway.errors import MalformedRequest, RequestTooLarge
from deployments.gateway.interceptors.reading import Received

# Objects, lists and their members in one JSON message. Each costs a hundred bytes and more once it is parsed, so a
# message of nothing else would take a hundred times its size; the largest that the contract allows has far fewer.
MAX_JSON_PARTS = 250_000

Headers = Sequence[tuple[bytes, bytes]]


def loads(data: bytes) -> Any:
    """Parse JSON of a caller who is not trusted.

    Raises
    ------
    MalformedRequest
        When it is none, or has more parts than any request needs.
    """
    if data.count(b",") + data.count(b"{") + data.count(b"[") > MAX_JSON_PARTS:
        raise MalformedRequest(f"the JSON has more than {MAX_JSON_PARTS} parts")
    try:
        return json.loads(data)
    except RecursionError:
        raise MalformedRequest("the JSON is nested too deeply") from None
    except ValueError as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None


def dumps(value: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def media_type(headers: Headers) -> str:
    """Return the media type of a body, without parameters; empty where there is none."""
    return dict(headers).get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()


class CallerGone(Exception):
    """The caller closed its connection before it was answered."""


@dataclass(slots=True)
class Body:
    """The body of one request, read once somebody asks for it.

    Attributes
    ----------
    receive
        ASGI's.
    headers
        Of the request.
    max_bytes
        Of the body.
    """

    receive: Callable[[], Awaitable[Any]]
    headers: Headers
    max_bytes: int
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def messages(self, make: Callable[[bytes], Any]) -> AsyncIterator[Received]:
        """Yield the one message that `make` makes of the body, or why there is none, for the chain to raise."""
        size = 0
        try:
            data = await self._read()
            size = len(data)
            message = make(data)
        except Exception as error:
            yield Received(size, None, error)
        else:
            yield Received(size, message)

    async def empty(self) -> AsyncIterator[Received]:
        """Yield nothing but that there is nothing, for a call whose request is in its address."""
        yield Received(0, b"")

    async def _read(self) -> bytes:
        announced = int(dict(self.headers).get(b"content-length", b"0"))
        if announced > self.max_bytes:
            raise self._too_large(announced)
        data = bytearray()
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.ended.set()
                raise MalformedRequest("the request ended before it was whole")
            data += message.get("body", b"")
            if len(data) > self.max_bytes:
                raise self._too_large(len(data))
            more = message.get("more_body", False)
        self.ended.set()
        return bytes(data)

    def _too_large(self, size: int) -> RequestTooLarge:
        return RequestTooLarge(f"the request has {size} bytes; {self.max_bytes} are allowed")

    async def unless_gone(self, work: Awaitable[Any]) -> Any:
        """Await `work`, which reads this body.

        Raises
        ------
        CallerGone
            When the caller goes before; `work` is cancelled.
        """
        working = asyncio.ensure_future(work)
        watching = asyncio.create_task(self._gone())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise CallerGone
            return await working
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.wait({working, watching})

    async def _gone(self) -> None:
        await self.ended.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass


async def send_json(
    send: Callable[[Any], Awaitable[None]], status: int, body: bytes, headers: Headers = ()
) -> None:
    """Answer with JSON."""
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": False})
