"""What callers can make the gateway hold: half-sent requests, silent streams, and who is left room beside them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.gateway.errors import Draining, MalformedRequest, RequestSlow, StreamIdle, TooManyCalls
from deployments.gateway.interceptors import reading
from deployments.gateway.interceptors.reading import Received, Requests

LARGEST = 100
SOON = 0.01
NEVER = 600.0
ROUNDS = 2_000


def requests(**changed: Any) -> Requests:
    settings = {
        "max_bytes": 4 * LARGEST,
        "largest_bytes": LARGEST,
        "read_s": NEVER,
        "patience_s": NEVER,
        "max_streams": 4,
        "idle_s": NEVER,
        "idle_patience_s": NEVER,
    }
    return Requests(**{**settings, **changed})


class Sender:
    """Sends a call's messages when it is told to."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Received | None] = asyncio.Queue()

    def send(self, size: int = 10) -> None:
        self.messages.put_nowait(Received(size, "message"))

    async def __aiter__(self) -> AsyncIterator[Received]:
        while (message := await self.messages.get()) is not None:
            yield message


def call(caller: str, sender: Sender, streaming: bool = False) -> Any:
    return SimpleNamespace(caller=caller, client_streaming=streaming, requests=aiter(sender), request=None)


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Running:
    """A call in the layer; `task` ends with its error."""

    def __init__(self, layer: Requests, caller: str, streaming: bool = False) -> None:
        self.sender = Sender()
        self.call = call(caller, self.sender, streaming)
        self.read = asyncio.Event()
        self.finish = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(layer))

    async def _run(self, layer: Requests) -> None:
        async with layer.layer(self.call):
            if self.call.client_streaming:
                async for _ in self.call.requests:
                    self.read.set()
            else:
                self.read.set()
            await self.finish.wait()

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_a_request_counts_as_the_largest_until_it_is_there_and_as_itself_until_it_is_answered() -> None:
    layer = requests()
    running = Running(layer, "a")
    await turns()
    assert layer.bytes == LARGEST
    running.sender.send(7)
    await running.read.wait()
    assert (running.call.request, layer.bytes) == ("message", 7)
    running.finish.set()
    await running.task
    assert layer.bytes == 0


async def test_half_sent_requests_of_one_caller_leave_half_of_the_room_to_others() -> None:
    layer = requests()
    hostile = [Running(layer, "hostile") for _ in range(10)]
    await turns()
    assert layer.bytes == 2 * LARGEST
    honest = Running(layer, "honest")
    honest.sender.send()
    await honest.read.wait()
    for running in (*hostile, honest):
        await running.end()
    assert layer.bytes == 0


async def test_who_waits_for_room_gets_that_of_the_oldest_request_of_the_caller_who_holds_most() -> None:
    layer = requests(max_bytes=6 * LARGEST, patience_s=SOON)
    hostile = [Running(layer, "first") for _ in range(3)]
    await turns()
    others = [Running(layer, name) for name in ("second", "second", "third")]
    await turns()
    assert layer.bytes == 6 * LARGEST
    honest = Running(layer, "honest")
    honest.sender.send()
    await honest.read.wait()
    with pytest.raises(RequestSlow, match="0.01 s"):
        await hostile[0].task
    assert not any(running.task.done() for running in (*hostile[1:], *others))
    for running in (*hostile, *others, honest):
        await running.end()
    assert layer.bytes == 0


async def test_a_request_that_nobody_waits_for_may_take_its_time_and_no_more() -> None:
    running = Running(requests(read_s=SOON), "a")
    with pytest.raises(RequestSlow):
        await running.task
    patient = Running(requests(patience_s=0.0), "a")
    await asyncio.sleep(0.05)
    assert not patient.task.done()
    await patient.end()


async def test_a_call_without_a_request_is_told_so() -> None:
    running = Running(requests(), "a")
    running.sender.messages.put_nowait(None)
    with pytest.raises(MalformedRequest):
        await running.task


async def test_room_comes_back_whenever_and_however_calls_end() -> None:
    layer, chance = requests(patience_s=0.001), random.Random(0)
    running: list[Running] = []
    for _ in range(ROUNDS):
        running.append(Running(layer, chance.choice("abc")))
        if chance.random() < 0.5:
            chance.choice(running).sender.send(chance.randrange(LARGEST))
        if chance.random() < 0.4:
            chance.choice(running).task.cancel()
        if chance.random() < 0.3:
            chance.choice(running).finish.set()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
        assert 0 <= layer.bytes <= 4 * LARGEST
    for one in running:
        await one.end()
    assert layer.bytes == 0
    last = Running(layer, "a")
    last.sender.send()
    await last.read.wait()
    await last.end()


async def test_silent_streams_of_one_caller_leave_places_to_others() -> None:
    layer = requests()
    hostile = [Running(layer, "hostile", True) for _ in range(5)]
    await turns()
    refused = [running.task.exception() for running in hostile if running.task.done()]
    assert [type(error) for error in refused] == [TooManyCalls] * 3
    honest = Running(layer, "honest", True)
    honest.sender.send()
    await honest.read.wait()
    assert layer.streams == 3
    for running in (*hostile, honest):
        await running.end()
    assert layer.streams == 0


async def test_a_place_that_others_want_is_taken_from_the_longest_silent_stream() -> None:
    layer = requests(idle_patience_s=0.0)
    silent = [Running(layer, name, True) for name in ("first", "first", "second", "second")]
    await turns()
    honest = Running(layer, "honest", True)
    honest.sender.send()
    await honest.read.wait()
    with pytest.raises(StreamIdle):
        await silent[0].task
    assert not any(running.task.done() for running in silent[1:])
    for running in (*silent, honest):
        await running.end()
    patient = requests()
    silent = [Running(patient, name, True) for name in ("first", "first", "second", "second")]
    await turns()
    with pytest.raises(TooManyCalls):
        await Running(patient, "honest", True).task
    for running in silent:
        await running.end()


async def test_a_stream_that_sends_nothing_is_ended() -> None:
    running = Running(requests(idle_s=SOON), "a", True)
    with pytest.raises(StreamIdle, match="0.01 s"):
        await running.task


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_server_that_stops_does_not_wait_for_who_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, streaming: bool, when: str
) -> None:
    monkeypatch.setattr(reading, "_DRAIN_S", SOON)
    layer = requests()
    if when == "before":
        layer.drain()
    running = Running(layer, "a", streaming)
    await turns()
    if when == "after":
        layer.drain()
    with pytest.raises(Draining):
        await running.task


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 1), (5, 2), (512, 256)])
def test_half_of_the_places_is_the_most_for_one_caller(places: int, most: int) -> None:
    assert reading.share(places) == most


def test_the_size_is_checked_before_a_message_is_made() -> None:
    decoded: list[bytes] = []
    deserialize = reading.checked_deserializer(lambda data: decoded.append(data), 3)
    assert deserialize(b"abc").error is None
    assert deserialize(b"abcd").error is not None
    assert decoded == [b"abc"]
