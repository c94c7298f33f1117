"""What becomes of calls when an encoder's replica dies, without Ray running."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.batching import DeadlineExpired
from deployments.cluster import handles
from deployments.cluster.app import GatewayReplica
from deployments.cluster.handles import BundleModels, ModelHandle
from deployments.cluster.replicas import EncoderReplica
from deployments.encoder.tasks import EncoderFault, ReplicaFaulty, Reply
from deployments.gateway.errors import EncoderUnavailable
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.errors import InvalidInput


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


async def test_a_death_that_no_call_meets_is_told_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_PROBE_S", 0.05)
    monkeypatch.setattr(handles, "_AGAIN_S", 0.02)
    deaths: list[None] = []
    told: list[bool] = []

    async def changed(alive: bool) -> None:
        told.append(alive)

    handle = Handle(RayActorError(), Reply(()))
    handle.infos = [RayActorError() for _ in range(10)]
    model = ModelHandle("encoder", handle, lambda: deaths.append(None), changed)
    model.notice(died=False)
    async with asyncio.timeout(30):
        while told != [False]:
            await asyncio.sleep(0.01)
        await model.call("encode", [], [])
        while told != [False, True]:
            await asyncio.sleep(0.01)
    assert len(deaths) == 1
    # One of several that is no longer wanted is no death.
    model.notice(died=False)
    await asyncio.sleep(0.01)
    assert len(deaths) == 1 and model.alive


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


async def test_a_replica_without_a_model_is_passed_over_for_one_with() -> None:
    handle = Handle(ReplicaFaulty(), ReplicaFaulty(), Reply(()))
    assert await ModelHandle("encoder", handle).call("encode", [], []) == Reply(())
    assert handle.calls == 3


async def test_where_no_replica_has_a_model_the_caller_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handles, "_LOOK_S", 0.01)
    monkeypatch.setattr(handles, "_LOOK_AGAIN_S", 0.01)
    with pytest.raises(EncoderUnavailable):
        await ModelHandle("encoder", Handle(*[ReplicaFaulty() for _ in range(9)])).call("encode", [], [])


async def test_a_call_that_nobody_answers_ends_before_its_callers_deadline_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DeadlineExpired):
        # So soon nobody can tell a replica that is hung from one that works.
        await ModelHandle("encoder", Handle(None)).call("encode", [], [], remaining_s=0.05)
    monkeypatch.setattr(handles, "_SILENCE_S", 0.1)
    handle = Handle(None)
    model = ModelHandle("encoder", handle)
    began = asyncio.get_running_loop().time()
    with pytest.raises(EncoderUnavailable, match="no replica of the model answered in time"):
        await model.call("encode", [], [], remaining_s=0.2)
    assert asyncio.get_running_loop().time() - began >= 0.18
    assert handle.responses[0].cancelled
    assert model.stalled_s == 0.0
    assert [handles._within(s) for s in (None, 100.0, 1.0, -1.0)] == [600.0, 99.75, 0.95, 0.0]


async def test_a_call_that_is_only_slow_beside_others_that_are_answered_says_that_its_time_is_over() -> None:
    handle = Handle(None, Reply(()))
    model = ModelHandle("encoder", handle)
    slow = asyncio.create_task(model.call("encode", [], [], remaining_s=0.5))
    await asyncio.sleep(0)
    await model.call("encode", [], [])
    with pytest.raises(DeadlineExpired):
        await slow


async def test_work_in_flight_that_nobody_answers_is_counted_in_seconds() -> None:
    model = ModelHandle("encoder", Handle(None, Reply(())))
    assert model.stalled_s == 0.0
    call = asyncio.create_task(model.call("encode", [], []))
    await asyncio.sleep(0.05)
    waited = model.stalled_s
    assert waited > 0.04
    await model.call("encode", [], [])
    # Something was answered, so that much is not stalled.
    assert model.stalled_s < waited + 0.04
    call.cancel()
    await asyncio.wait([call])
    assert model.stalled_s == 0.0


async def test_a_stream_that_nobody_answers_ends_before_its_callers_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handles, "_SILENCE_S", 0.05)
    handle = Streams()
    model = ModelHandle("generator", handle)
    with pytest.raises(EncoderUnavailable):
        async for _ in model.stream("generate", "work", remaining_s=0.1):
            raise AssertionError("nothing came")
    assert handle.cancelled
    handle.first = True
    got = []
    with pytest.raises(DeadlineExpired):
        async for message in model.stream("generate", "work", remaining_s=0.1):
            got.append(message)
    assert got == ["first"]


class Streams:
    """Stands in for a generator's handle: one message or none, and then nothing."""

    def __init__(self) -> None:
        self.first = False
        self.cancelled = False

    def options(self, **_: Any) -> Streams:
        return self

    @property
    def generate(self) -> Streams:
        return self

    def remote(self, *_: Any) -> Streams:
        return self

    async def __aiter__(self) -> Any:
        if self.first:
            yield "first"
        await asyncio.sleep(3600)

    def cancel(self) -> None:
        self.cancelled = True


async def test_hung_and_lost_are_told_as_one_state() -> None:
    told: list[bool] = []

    async def changed(alive: bool) -> None:
        told.append(alive)

    model = ModelHandle("encoder", Handle(), changed=changed)
    for hung in (False, True, True, False):
        await model.set_hung(hung)
    assert told == [False, True]


async def test_a_replica_without_a_model_says_so_and_fails_its_second_check_of_health() -> None:
    cold: Any = EncoderReplica.__new__(EncoderReplica)
    cold._encoder, cold._fault, cold._checked = None, EncoderFault("no memory"), False
    for call in (cold.encode([], []), cold.score(None)):
        with pytest.raises(ReplicaFaulty):
            await call
    await cold.check_health()
    with pytest.raises(ReplicaFaulty, match="no memory"):
        await cold.check_health()
    assert (await cold.record_routing_stats())["fault"] == "no memory"


async def test_on_a_cluster_a_replica_without_a_model_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Settings) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr("deployments.cluster.replicas._warm_encoder", fail)
    monkeypatch.setattr("deployments.cluster.replicas.logs.configure", lambda *_: None)
    cold = EncoderReplica(Settings(loopback_only=False))
    # Serve asks before it says that the deployment is healthy, and KubeRay before it deletes the cluster before.
    with pytest.raises(ReplicaFaulty, match="MemoryError: no memory"):
        await cold.check_health()
    assert cold.info() == EncoderFault("MemoryError: no memory")


async def test_a_score_that_the_encoder_refuses_is_a_value_between_processes_and_an_error_at_the_gateway() -> (
    None
):
    server: Any = SimpleNamespace(metrics=Metrics(), set_serving=None, set_generating=None)
    bundle: Any = SimpleNamespace(encoder="encoder", generator="generator", name="tiny")
    encoder = Handle(InvalidInput("too few"))
    models = BundleModels(server, bundle, SimpleNamespace(score=encoder), None)
    encoder.responses[0]._answer = lambda: answered(InvalidInput("too few"))  # type: ignore[method-assign]
    info: Any = None
    request: Any = SimpleNamespace(remaining_s=None)
    with pytest.raises(InvalidInput):
        await models.backend(info).score(request)


async def answered(value: Any) -> Any:
    return value


async def test_a_gateway_goes_on_asking_encoders_that_could_not_be_warmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.cluster.app._AGAIN_S", 0.01)
    served = asyncio.Event()

    class Server:
        async def serve_all(self, backends: Any) -> None:
            served.set()

    infos = [EncoderFault("no bundle"), EncoderFault("no bundle"), "info"]

    async def encoder_info() -> Any:
        return infos.pop(0)

    async def generate_when_warm() -> None:
        return

    models = SimpleNamespace(
        encoder_info=encoder_info,
        generate_when_warm=generate_when_warm,
        backend=lambda info: info,
        bundle=SimpleNamespace(encoder="encoder"),
    )
    gateway: Any = SimpleNamespace(_models=[models], _server=Server(), _tasks=[])
    gateway._verdict = asyncio.get_running_loop().create_future()
    for name in ("_infos", "_decide", "_serve_when_warm"):
        setattr(gateway, name, getattr(GatewayReplica, name).__get__(gateway))
    warming = asyncio.create_task(gateway._serve_when_warm())
    # The command is told the reason at once, and the server serves once it can.
    assert await GatewayReplica.warmed(gateway) == "encoder: no bundle"
    async with asyncio.timeout(30):
        await served.wait()
    await warming
    await asyncio.gather(*gateway._tasks)
