"""What the gateway's replica does when an encoder's replica dies, without Ray running."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.app import GatewayReplica
from deployments.gateway.errors import EncoderUnavailable
from deployments.work import Reply


class Response:
    """Stands in for Serve's response: fails, answers, or never comes."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.cancelled = False

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self.outcome is None:
            await asyncio.sleep(3600)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands in for the encoder's handle; answers `encode` with each outcome in turn."""

    def __init__(self, *outcomes: Any) -> None:
        self.responses = [Response(outcome) for outcome in outcomes]
        self.calls = 0

    @property
    def encode(self) -> Handle:
        return self

    def remote(self, *args: Any) -> Response:
        self.calls += 1
        return self.responses[self.calls - 1]


def replica(handle: Handle) -> Any:
    gateway: Any = GatewayReplica.__new__(GatewayReplica)
    gateway._encoder = handle
    return gateway


async def test_a_call_is_repeated_once_when_its_replica_dies() -> None:
    handle = Handle(RayActorError(), Reply(()))
    assert await replica(handle)._encode([], []) == Reply(())
    assert handle.calls == 2


async def test_a_second_death_is_told_as_unavailable() -> None:
    handle = Handle(RayActorError(), RayActorError())
    with pytest.raises(EncoderUnavailable):
        await replica(handle)._encode([], [])


async def test_an_error_of_the_encoder_itself_is_not_repeated() -> None:
    handle = Handle(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await replica(handle)._encode([], [])
    assert handle.calls == 1


async def test_an_abandoned_call_is_cancelled_at_the_encoder() -> None:
    handle = Handle(None)
    call = asyncio.create_task(replica(handle)._encode([], []))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert handle.responses[0].cancelled
