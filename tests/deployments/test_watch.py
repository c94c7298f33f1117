"""The watch over the replicas, with a clock and with replicas of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.cluster import watch
from deployments.cluster.watch import END_S, END_STUCK_S, Watch
from deployments.encoder.encoder import Encoder, EncoderFailed
from deployments.operations.metrics import Metrics
from deployments.operations.pulse import LATE_S, Activity, Pulse, take_pulse
from deployments.operations.settings import Settings
from tests.deployments.debug import DebugModel

WELL = Pulse(1.0, 1000, 7)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Replicas that answer with a pulse, raise, or never answer (None)."""

    def __init__(self, **pulses: Any) -> None:
        self.pulses = {name.replace("_", "#"): pulse for name, pulse in pulses.items()}
        self.ended: list[str] = []

    def names(self) -> list[str]:
        return list(self.pulses)

    async def ask(self, name: str) -> Pulse:
        while self.pulses[name] is None:
            await asyncio.sleep(0.001)
        if isinstance(self.pulses[name], Exception):
            raise self.pulses[name]
        pulse: Pulse = self.pulses[name]
        return pulse

    def end(self, name: str) -> None:
        self.ended.append(name)


class Told:
    """Stands in for a handle."""

    def __init__(self) -> None:
        self.hung = False
        self.noticed = 0

    async def set_hung(self, hung: bool) -> None:
        self.hung = hung

    def notice(self, died: bool = True) -> None:
        self.noticed += 1


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, **pulses: Any) -> None:
        # How long a look waits for those who do not answer.
        monkeypatch.setattr(watch, "PERIOD_S", 0.1)
        self.replicas = Fake(**pulses)
        self.clock = Clock()
        self.handle = Told()
        self.metrics = Metrics()
        handles: Any = {"encoder": self.handle}
        self.watch = Watch(self.replicas, handles, self.metrics, self.clock)

    async def after(self, seconds: float) -> None:
        self.clock.now += seconds
        await self.watch.look()

    def value(self, name: str, replica: str = "a") -> float | None:
        labels = {"deployment": "encoder", "replica": replica}
        return self.metrics.registry.get_sample_value(name, labels)

    @property
    def hung(self) -> float | None:
        return self.metrics.registry.get_sample_value("monofacet_replicas_hung", {"deployment": "encoder"})


async def test_a_replica_that_stops_answering_is_told_of_ended_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL)
    await scene.after(0)
    assert (scene.handle.hung, scene.hung) == (False, 0)
    scene.replicas.pulses["encoder#a"] = None
    await scene.after(2)
    await scene.after(LATE_S - 1)
    assert (scene.handle.hung, scene.hung) == (False, 0)
    await scene.after(2)
    assert (scene.handle.hung, scene.hung, scene.replicas.ended) == (True, 1, [])
    # It grows by itself, at every scrape.
    scene.clock.now += 3
    assert scene.value("monofacet_replica_silent_seconds") == LATE_S + 4
    await scene.after(END_S - LATE_S)
    assert (scene.handle.hung, scene.replicas.ended, scene.handle.noticed) == (True, ["encoder#a"], 1)
    await scene.after(2)
    assert scene.replicas.ended == ["encoder#a"]
    # Gone; its successor is starting, and then answers.
    scene.replicas.pulses = {"encoder#b": RuntimeError("not initialised")}
    await scene.after(2)
    assert scene.value("monofacet_replica_silent_seconds") is None
    scene.replicas.pulses = {"encoder#b": WELL}
    await scene.after(2)
    assert (scene.handle.hung, scene.hung) == (False, 0)


async def test_beside_one_that_answers_a_hung_replica_is_ended_and_the_model_serves_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL, encoder_b=WELL)
    await scene.after(0)
    scene.replicas.pulses["encoder#a"] = None
    await scene.after(1)
    await scene.after(LATE_S + 1)
    assert (scene.handle.hung, scene.hung) == (False, 1)
    await scene.after(END_S)
    assert (scene.handle.hung, scene.replicas.ended) == (False, ["encoder#a"])


async def test_a_replica_that_dies_while_nobody_calls_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL, encoder_b=RuntimeError("not initialised"))
    await scene.after(0)
    scene.replicas.pulses = {}
    await scene.after(2)
    # The one that never answered was starting, and nobody counted on it.
    assert scene.handle.noticed == 1


async def test_a_replica_that_goes_on_in_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL)
    await scene.after(0)
    scene.replicas.pulses["encoder#a"] = None
    await scene.after(1)
    await scene.after(LATE_S + 1)
    assert scene.handle.hung
    scene.replicas.pulses["encoder#a"] = WELL
    await scene.after(1)
    await scene.after(1)
    assert (scene.handle.hung, scene.hung, scene.replicas.ended) == (False, 0, [])


async def test_a_replica_that_never_answered_is_starting_and_not_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, encoder_a=None)
    await scene.after(0)
    await scene.after(1000)
    assert (scene.handle.hung, scene.hung, scene.replicas.ended) == (False, 0, [])


async def test_a_replica_that_is_loading_may_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, encoder_a=Pulse(1.0, 1000, ready=False))
    await scene.after(0)
    scene.replicas.pulses["encoder#a"] = None
    await scene.after(2)
    await scene.after(1000)
    assert (scene.handle.hung, scene.hung, scene.replicas.ended) == (False, 0, [])
    assert scene.value("monofacet_replica_memory_bytes") == 1000


async def test_a_replica_whose_model_is_stuck_is_hung_at_once_and_ended_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL)
    await scene.after(0)
    scene.replicas.pulses["encoder#a"] = Pulse(1.0, 1000, 0, "a forward has run for 12 s")
    await scene.after(2)
    assert (scene.handle.hung, scene.hung, scene.replicas.ended) == (True, 1, [])
    await scene.after(END_STUCK_S + 1)
    assert scene.replicas.ended == ["encoder#a"]


async def test_what_replicas_use_is_observed_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL, gateway_c=WELL)
    await scene.after(0)
    scene.replicas.pulses["encoder#a"] = Pulse(5.0, 2000, 9)
    await scene.after(2)
    assert scene.value("monofacet_replica_cpus") == 2.0
    assert scene.value("monofacet_replica_memory_bytes") == 2000
    assert scene.value("monofacet_replica_gpu_memory_bytes") == 9
    page = [m for m in scene.metrics.registry.collect() if m.name == "monofacet_replica_memory_bytes"]
    assert [sample.labels["deployment"] for sample in page[0].samples] == ["encoder"]


async def test_the_watch_goes_on_whatever_ray_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, encoder_a=WELL)
    names, looked = scene.replicas.names, asyncio.Event()
    asked = 0

    def sometimes() -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise RuntimeError("the GCS is gone")
        loop.call_soon_threadsafe(looked.set)
        return names()

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(scene.replicas, "names", sometimes)
    running = asyncio.create_task(scene.watch.run())
    async with asyncio.timeout(60):
        await looked.wait()
    running.cancel()
    await asyncio.wait([running])


def test_what_runs_is_stuck_by_the_measure_of_the_longest_before_it() -> None:
    clock = Clock()
    activity = Activity(10.0, clock)
    with activity.running("forward"):
        clock.now += 10
        assert activity.stuck == ""
        clock.now += 1
        assert activity.stuck == "a forward has run for 11 s, the longest before for 0 s"
    assert activity.stuck == ""
    assert activity.worked == clock.now
    with activity.running("forward"):
        clock.now += 109
        assert activity.stuck == ""
        clock.now += 2
        assert activity.stuck.startswith("a forward has run for 111 s")
    # One that fails says nothing of how long one takes.
    with pytest.raises(ValueError), activity.running("step"):
        clock.now += 100
        raise ValueError
    assert activity._longest.keys() == {"forward"}


def test_a_pulse_tells_what_this_process_uses() -> None:
    pulse = take_pulse(fault="no bundle")
    assert pulse.cpu_s > 0 and pulse.memory_bytes > 10_000_000
    assert (pulse.gpu_bytes, pulse.stuck, pulse.fault) == (0, "", "no bundle")


async def test_the_encoders_health_is_that_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DebugModel()
    encoder = Encoder(Settings(decode_threads=1), model, {})
    await encoder.check_health()
    assert model.forwards == [1]
    # What was tried is not tried again after real work.
    with encoder.activity.running("forward"):
        pass
    await encoder.check_health()
    assert model.forwards == [1]

    def broken(*_: Any) -> Any:
        raise RuntimeError("the GPU fell off the bus")

    with monkeypatch.context() as context:
        context.setattr(model, "encode_texts", broken)
        with pytest.raises(RuntimeError, match="fell off"):
            await encoder.check_health()
    monkeypatch.setattr(Activity, "stuck", "a forward has run for 99 s")
    with pytest.raises(EncoderFailed, match="99 s"):
        await encoder.check_health()
    await encoder.close()
