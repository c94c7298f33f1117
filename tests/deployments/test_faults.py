"""Faults put into each thread and loop of a replica: every call is answered, and the next one is served."""

from __future__ import annotations

import asyncio
import io
import logging
import logging.handlers
import queue
import sys
import threading
from typing import Any

import pytest

from deployments.batching import BatcherClosed, GreedyBatcher
from deployments.encoder.encoder import Encoder, EncoderFailed
from deployments.encoder.tasks import Encoded, EncodeTask, Reply, ScoreRequest
from deployments.operations import logs
from deployments.operations.settings import Settings
from tests.deployments.debug import DebugModel

# None may hang; a busy machine may be slow.
pytestmark = pytest.mark.timeout(120)


class Panic(BaseException):
    """As a panic of a Rust library: no Exception."""


def encoder_of(model: DebugModel) -> Encoder:
    return Encoder(Settings(decode_threads=1), model, {})


async def encode(encoder: Encoder, *texts: str) -> Any:
    reply: Reply = await encoder.encode([EncodeTask((text,)) for text in texts], [None] * len(texts))
    return list(reply.answers)


def break_once(monkeypatch: pytest.MonkeyPatch, thing: Any, name: str, error: BaseException) -> None:
    def broken(*_: Any) -> Any:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(thing, name, broken)


@pytest.mark.parametrize("error", [RuntimeError("/secret"), MemoryError(), Panic("/secret")])
@pytest.mark.parametrize("where", ["prepare", "encode_texts"])
async def test_a_thread_that_meets_an_error_answers_and_serves_the_next_call(
    monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    model = DebugModel()
    encoder = encoder_of(model)
    break_once(monkeypatch, model, where, error)
    (failed,) = await encode(encoder, "a")
    assert isinstance(failed, EncoderFailed) and "secret" not in str(failed)
    (answer,) = await encode(encoder, "b")
    assert isinstance(answer, Encoded)
    await encoder.close()


async def test_closing_answers_what_is_being_decoded_what_waits_and_what_runs() -> None:
    model = DebugModel()
    encoder = encoder_of(model)
    prepare = model.prepare
    blocked = asyncio.Event()
    loop = asyncio.get_running_loop()
    model.hold()

    def slow(item: bytes | str, truncate_text: bool) -> Any:
        if item == "slow":
            loop.call_soon_threadsafe(blocked.set)
            assert model._free.wait(60)
        return prepare(item, truncate_text)

    model.prepare = slow  # type: ignore[method-assign]
    calls = [asyncio.create_task(encode(encoder, text)) for text in ("running", "slow", "waiting")]
    await blocked.wait()
    closing = asyncio.create_task(encoder.close())
    await asyncio.sleep(0)
    with pytest.raises(BatcherClosed):
        await encode(encoder, "late")
    model.release()
    await closing
    assert all(isinstance(answer, Encoded) for (answer,) in await asyncio.gather(*calls))


async def test_a_score_that_has_not_begun_when_the_encoder_closes_is_refused_and_not_lost() -> None:
    encoder = encoder_of(DebugModel())
    began, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def held(*_: Any) -> Any:
        loop.call_soon_threadsafe(began.set)
        assert go_on.wait(60)
        return "scored"

    encoder._scoring._score = held  # type: ignore[method-assign]
    request = ScoreRequest("d", (), (), ())
    first = asyncio.create_task(encoder.score(request))
    await began.wait()
    second = asyncio.create_task(encoder.score(request))
    await asyncio.sleep(0)
    closing = asyncio.create_task(encoder.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert await first == "scored"
    with pytest.raises(BatcherClosed):
        await second


@pytest.mark.parametrize("error", [RuntimeError("broken"), Panic("broken")])
async def test_whatever_a_batch_raises_reaches_its_callers_as_an_exception(error: BaseException) -> None:
    async def run(items: list[int]) -> list[int]:
        if items == [0]:
            raise error
        return items

    batcher: GreedyBatcher[int, int] = GreedyBatcher(run, max_batch=1, max_queued=8)
    with pytest.raises(RuntimeError, match="broken"):
        await batcher.submit([0])
    assert (await batcher.submit([1])).results == [1]


async def test_callers_of_a_batch_that_is_cancelled_from_below_are_told() -> None:
    async def run(items: list[int]) -> list[int]:
        # What an executor does to its futures when it is shut down.
        raise asyncio.CancelledError

    batcher: GreedyBatcher[int, int] = GreedyBatcher(run, max_batch=8, max_queued=8)
    with pytest.raises(BatcherClosed):
        await batcher.submit([1])


class Broken:
    """A standard error that cannot be written: its disk is full, its reader has gone, or it is closed."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def buffer(self) -> Any:
        return self

    def write(self, data: bytes) -> int:
        raise self._error


@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError(), ValueError("closed file")])
def test_the_thread_that_writes_the_log_outlives_what_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    waiting: queue.Queue[Any] = queue.Queue()
    handler = logs._SocketHandler("/nowhere")
    handler.setFormatter(logging.Formatter("%(message)s"))
    listener = logging.handlers.QueueListener(waiting, handler)
    listener.start()
    kept = io.TextIOWrapper(io.BytesIO())
    for stream in (Broken(error), kept):
        monkeypatch.setattr(sys, "stderr", stream)
        waiting.put(logging.LogRecord("a", logging.INFO, "", 0, "line", None, None))
        waiting.join()
    listener.stop()
    monkeypatch.undo()
    assert kept.detach().getvalue() == b"line\n"
