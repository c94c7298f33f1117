"""What a handle's stream does when a replica dies or its caller leaves, without Ray running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RequestCancelledError

from deployments.cluster.handles import ModelHandle
from deployments.gateway.errors import EncoderUnavailable


class Response:
    """Stands in for Serve's response generator: gives its items, raises what is an exception, then ends."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands in for Serve's handle; answers `generate` with each response in turn."""

    def __init__(self, *responses: Response) -> None:
        self.responses = responses
        self.calls = 0
        self.streaming = False

    def options(self, stream: bool) -> Handle:
        self.streaming = stream
        return self

    @property
    def generate(self) -> Handle:
        return self

    @property
    def info(self) -> Handle:
        return Handle(Response())

    def remote(self, *args: Any) -> Any:
        self.calls += 1
        return self.responses[self.calls - 1]

    def __await__(self) -> Any:
        return asyncio.sleep(0).__await__()


async def collect(handle: Handle) -> list[Any]:
    return [item async for item in ModelHandle("generator", handle).stream("generate")]


async def test_a_stream_is_what_the_replica_says() -> None:
    handle = Handle(Response(1, 2, 3))
    assert await collect(handle) == [1, 2, 3]
    assert handle.streaming
    assert handle.calls == 1


async def test_a_stream_is_begun_again_when_its_replica_dies_before_the_first_answer() -> None:
    handle = Handle(Response(RayActorError()), Response(1, 2))
    assert await collect(handle) == [1, 2]


@pytest.mark.parametrize("first", [Response(1, RayActorError()), Response(RayActorError())])
async def test_a_replica_that_dies_on_the_way_is_told_as_unavailable(first: Response) -> None:
    handle = Handle(first, Response(RayActorError()))
    with pytest.raises(EncoderUnavailable):
        await collect(handle)
    assert handle.calls == (1 if first.items[0] == 1 else 2)


async def test_leaving_a_stream_cancels_it_at_the_replica() -> None:
    response = Response(1, 2, 3)
    async with aclosing(ModelHandle("generator", Handle(response)).stream("generate")) as stream:
        async for _ in stream:
            break
    assert response.cancelled


async def test_serves_own_cancellation_is_a_cancellation() -> None:
    response = Response(1, RequestCancelledError("x"))
    with pytest.raises(asyncio.CancelledError):
        await collect(Handle(response))
    assert response.cancelled
