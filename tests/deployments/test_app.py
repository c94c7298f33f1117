"""What becomes of calls when an encoder's replica dies, without Ray running."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments import handles
from deployments.app import EncoderReplica
from deployments.bundle_models import BundleModels
from deployments.gateway.errors import EncoderUnavailable
from deployments.handles import ModelHandle
from deployments.metrics import Metrics
from deployments.work import EncoderFault, Reply


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
        await asyncio.sleep(0)
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
        self.infos: list[Any] = []

    @property
    def encode(self) -> Handle:
        return self

    def remote(self, *args: Any) -> Response:
        self.calls += 1
        return self.responses[self.calls - 1]

    @property
    def info(self) -> Any:
        return self.prober

    @property
    def prober(self) -> Any:
        outer = self

        class Info:
            def remote(self) -> Response:
                return Response(outer.infos.pop(0) if outer.infos else "info")

        return Info()


async def test_a_call_is_repeated_once_when_its_replica_dies() -> None:
    handle = Handle(RayActorError(), Reply(()))
    assert await ModelHandle("encoder", handle).call("encode", [], []) == Reply(())
    assert handle.calls == 2


async def test_a_second_death_is_told_as_unavailable() -> None:
    handle = Handle(RayActorError(), RayActorError())
    with pytest.raises(EncoderUnavailable):
        await ModelHandle("encoder", handle).call("encode", [], [])


async def test_an_error_of_the_encoder_itself_is_not_repeated() -> None:
    handle = Handle(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await ModelHandle("encoder", handle).call("encode", [], [])
    assert handle.calls == 1


async def test_an_abandoned_call_is_cancelled_at_the_encoder() -> None:
    handle = Handle(None)
    call = asyncio.create_task(ModelHandle("encoder", handle).call("encode", [], []))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert handle.responses[0].cancelled


async def test_one_death_is_counted_once_however_many_calls_it_fails() -> None:
    deaths: list[None] = []
    handle = Handle(*[RayActorError() for _ in range(5)], *[Reply(()) for _ in range(5)])
    model = ModelHandle("encoder", handle, lambda: deaths.append(None))
    await asyncio.gather(*(model.call("encode", [], []) for _ in range(5)))
    assert len(deaths) == 1
    assert model.alive


async def test_it_is_told_when_no_replica_is_left_and_when_one_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handles, "_PROBE_S", 0.05)
    monkeypatch.setattr(handles, "_AGAIN_S", 0.02)
    monkeypatch.setattr(handles, "_AGAIN_WHEN_FAULTY_S", 0.02)
    told: list[bool] = []

    async def changed(alive: bool) -> None:
        told.append(alive)

    handle = Handle(RayActorError(), Reply(()))
    # A replica that was started again but cannot be warmed is not back.
    handle.infos = [*[RayActorError() for _ in range(10)], EncoderFault("no memory")]
    model = ModelHandle("encoder", handle, changed=changed)
    await model.call("encode", [], [])
    async with asyncio.timeout(5):
        while told != [False, True]:
            await asyncio.sleep(0.01)
    assert model.alive
    assert not handle.infos


async def test_a_score_that_no_encoder_can_make_is_a_value_between_processes_and_an_error_at_the_gateway() -> (
    None
):
    cold: Any = SimpleNamespace(_encoder=None)
    request: Any = None
    answer = await EncoderReplica.score(cold, request)
    assert isinstance(answer, EncoderUnavailable)
    server: Any = SimpleNamespace(metrics=Metrics(), set_serving=None, set_generating=None)
    bundle: Any = SimpleNamespace(encoder="encoder", generator="generator", name="tiny")
    encoder = Handle(answer)
    models = BundleModels(server, bundle, SimpleNamespace(score=encoder), None)
    info: Any = None
    with pytest.raises(EncoderUnavailable):
        await models.backend(info).score(request)
