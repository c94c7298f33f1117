"""How many messages a gateway has on their way: enough for every replica, and no more."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from deployments.encoder.tasks import Encoded, EncodeTask, Reply, TravelsAlone
from deployments.gateway.encoder_client import EncoderClient
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings


class Encoders:
    """Stands in for replicas that answer in turn; counts the messages that are with them at once."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.messages = 0
        self.at_once = 0
        self.most_at_once = 0

    async def send(self, tasks: list[EncodeTask], remaining_s: list[float | None]) -> Reply:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        name = self.names[self.messages % len(self.names)]
        self.messages += 1
        await asyncio.sleep(0.002)
        self.at_once -= 1
        answer = Encoded(np.zeros((1, 2), np.float32), np.ones(1, np.float32))
        return Reply(tuple(answer for _ in tasks), replica=name)


async def most_at_once(encoders: Encoders) -> int:
    settings = Settings(messages_in_flight=2, coalesce_items=1, max_batch_items=64)
    client = EncoderClient(encoders.send, settings, Metrics(), "torch")
    for _ in range(4):
        await client.encode(EncodeTask(("warm",)))
    encoders.most_at_once = 0
    await asyncio.gather(*(client.encode(EncodeTask(("a",))) for _ in range(40)))
    return encoders.most_at_once


@pytest.mark.parametrize(("replicas", "messages"), [(1, 2), (2, 4), (4, 8)])
async def test_each_replica_that_answers_is_kept_busy(replicas: int, messages: int) -> None:
    assert await most_at_once(Encoders([str(n) for n in range(replicas)])) == messages


async def test_a_replica_that_is_no_longer_heard_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.encoder_client._FORGET_S", 0.0)
    assert await most_at_once(Encoders(["a", "b"])) == 2


async def test_replicas_are_those_that_answered_and_one_while_any_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive = True
    encoders = Encoders(["a", "b", "c"])
    client = EncoderClient(encoders.send, Settings(), Metrics(), "torch", alive=lambda: alive)
    assert client.replicas == 1
    for _ in range(3):
        await client.encode(EncodeTask(("a",)))
    assert client.replicas == 3
    monkeypatch.setattr("deployments.gateway.encoder_client._FORGET_S", -1.0)
    assert client.replicas == 1
    alive = False
    assert client.replicas == 0


async def test_texts_travel_apart_from_pictures_and_a_costly_picture_alone() -> None:
    messages: list[list[tuple[bytes | str, ...]]] = []

    async def send(tasks: list[EncodeTask], remaining_s: list[float | None]) -> Reply:
        messages.append([task.items for task in tasks])
        await asyncio.sleep(0)
        answer = Encoded(np.zeros((1, 2), np.float32), np.ones(1, np.float32))
        return Reply(
            tuple(TravelsAlone() if w.items == (b"costly",) and len(tasks) > 1 else answer for w in tasks)
        )

    client = EncoderClient(send, Settings(), Metrics(), "torch")
    items: list[tuple[bytes | str, ...]] = [("a",), (b"a",), ("b",), (b"costly",), (b"b", "b")]
    answers = await asyncio.gather(*(client.encode(EncodeTask(item)) for item in items))
    assert all(isinstance(answer, Encoded) for answer in answers)
    assert messages == [[("a",), ("b",)], [(b"a",), (b"costly",), (b"b", "b")], [(b"costly",)]]
