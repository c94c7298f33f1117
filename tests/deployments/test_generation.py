"""The engine: joins, bounds, cancellation within a step, deadlines, and failures that stay where they are."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from deployments.batching import BatcherClosed, DeadlineExpired, QueueFull
from deployments.generator.engine import Engine
from deployments.generator.events import Event, Failed, Finished, GenerateTask, Preview, Progress
from deployments.generator.generator import Generator, PipelineModel
from deployments.operations.settings import Settings
from services.errors import GenerationFailed, InvalidInput
from services.imaging.edits import ImageRequest
from services.imaging.generator import Imaging
from tests.deployments.debug_generation import DebugPipeline, DebugSample
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture
def model() -> Iterator[DebugPipeline]:
    made = DebugPipeline()
    yield made
    made.release()


def generator(model: DebugPipeline, **settings: Any) -> Generator:
    return Generator(Settings(**settings), model)


def work(prompt: str = "a", *seeds: int, **options: Any) -> GenerateTask:
    own = {name: options.pop(name) for name in ("unsteered", "preview_every", "caller") if name in options}
    return GenerateTask(ImageRequest(prompt, **options), seeds or (1,), **own)


async def collect(stream: AsyncIterator[Any]) -> list[Event]:
    return [event async for message in stream for event in message.events]


async def begun(model: DebugPipeline) -> None:
    """Wait until a step is being held."""
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)


async def test_progress_comes_with_every_step_and_an_image_at_the_end(model: DebugPipeline) -> None:
    events = await collect(generator(model).generate(work("a", 7, 8, num_inference_steps=3)))
    assert [e.steps for e in events if isinstance(e, Progress)] == [(1, 1), (2, 2), (3, 3)]
    finished = [e for e in events if isinstance(e, Finished)]
    assert sorted(e.number for e in finished) == [0, 1]
    assert {int(e.pixels[0, 0, 0]) for e in finished if e.pixels is not None} == {7, 8}
    assert all(e.delta == 0.5 and e.error is None for e in finished)
    assert model.batches == [["a", "a"]] * 3


async def test_twins_are_made_beside_their_images_without_steering(model: DebugPipeline) -> None:
    events = await collect(generator(model).generate(work("a", 7, unsteered=True)))
    finished = {e.number: e.delta for e in events if isinstance(e, Finished)}
    assert finished == {0: 0.5, 1: 0.0}


async def test_previews_come_as_often_as_asked_and_not_for_the_last_step(model: DebugPipeline) -> None:
    events = await collect(generator(model).generate(work("a", num_inference_steps=6, preview_every=2)))
    assert [(e.step, int(e.pixels[0, 0, 0])) for e in events if isinstance(e, Preview)] == [(2, 2), (4, 4)]


async def test_an_image_joins_between_two_steps_of_another(model: DebugPipeline) -> None:
    made = generator(model)
    model.hold()
    first = asyncio.create_task(collect(made.generate(work("a", num_inference_steps=3))))
    await begun(model)
    second = asyncio.create_task(collect(made.generate(work("b", num_inference_steps=2))))
    await until(lambda: "b" in model.prepared)
    model.release()
    await asyncio.gather(first, second)
    assert model.batches[0] == ["a"]
    assert ["a", "b"] in model.batches
    assert (model.steps_of("a"), model.steps_of("b")) == (3, 2)


async def test_sizes_that_differ_take_turns(model: DebugPipeline) -> None:
    made = generator(model)
    model.hold()
    calls = [
        asyncio.create_task(collect(made.generate(work(name, height=size))))
        for name, size in (("small", 32), ("large", 64))
    ]
    await begun(model)
    await until(lambda: len(model.prepared) == 2)
    model.release()
    await asyncio.gather(*calls)
    assert all(len(set(batch)) == 1 for batch in model.batches)
    # Not one after the other: each gets its turn while the other is under way.
    assert [batch[0] for batch in model.batches][1:-1] != sorted(batch[0] for batch in model.batches)[1:-1]
    assert model.calls == 8


async def test_a_batch_holds_no_more_images_than_allowed(model: DebugPipeline) -> None:
    await collect(generator(model, max_batch_images=3).generate(work("a", *range(8))))
    assert max(map(len, model.batches)) == 3
    assert model.steps_of("a") == 8 * 4


async def test_images_that_would_pass_the_memory_wait(model: DebugPipeline) -> None:
    model.bytes = 60
    await collect(generator(model, generation_bytes=100).generate(work("a", 1, 2, 3)))
    assert max(map(len, model.batches)) == 1
    model.bytes = 500
    assert len(await collect(generator(model, generation_bytes=100).generate(work("a")))) == 5


async def test_a_full_queue_refuses_at_once_and_an_empty_one_takes_anything(model: DebugPipeline) -> None:
    made = generator(model, max_queued_images=4, max_batch_images=1)
    model.hold()
    first = asyncio.create_task(collect(made.generate(work("a", 1, 2, 3))))
    await begun(model)
    second = asyncio.create_task(collect(made.generate(work("b", 1, 2))))
    await until(lambda: len(model.prepared) == 2)
    # One image is under way, two of the same call and two of the other wait.
    with pytest.raises(QueueFull):
        await collect(made.generate(work("c", 1)))
    model.release()
    await asyncio.gather(first, second)
    assert "c" not in model.prepared
    assert (
        len([e for e in await collect(made.generate(work("d", *range(9)))) if isinstance(e, Finished)]) == 9
    )


async def test_a_cancelled_call_takes_no_further_step(model: DebugPipeline) -> None:
    made = generator(model)
    model.hold()
    leaving = asyncio.create_task(collect(made.generate(work("leaving", num_inference_steps=50))))
    staying = asyncio.create_task(collect(made.generate(work("staying", num_inference_steps=6))))
    await until(lambda: len(model.prepared) == 2)
    await asyncio.to_thread(model.let_one_step)
    await asyncio.to_thread(model.let_one_step)
    # The third step is under way, and cannot be stopped; no fourth may begin.
    await begun(model)
    taken = model.steps_of("leaving")
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    model.release()
    events = await staying
    assert model.steps_of("leaving") <= taken + 1
    assert model.steps_of("staying") == 6
    assert isinstance(events[-1], Finished)


async def test_a_deadline_ends_a_call_within_a_step(model: DebugPipeline) -> None:
    made = generator(model)
    model.hold()
    call = asyncio.create_task(collect(made.generate(work("late", num_inference_steps=50), 0.2)))
    await begun(model)
    events = await call
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, DeadlineExpired)
    model.release()
    await collect(made.generate(work("next")))
    assert model.steps_of("late") <= 1


async def test_a_call_past_its_deadline_in_the_queue_never_runs(model: DebugPipeline) -> None:
    made = generator(model, max_batch_images=1)
    model.hold()
    first = asyncio.create_task(collect(made.generate(work("first"))))
    await begun(model)
    events = await collect(made.generate(work("late"), 0.05))
    assert isinstance(events[-1].error, DeadlineExpired)  # type: ignore[union-attr]
    model.release()
    await first
    await collect(made.generate(work("next")))
    assert model.steps_of("late") == 0


@pytest.mark.parametrize("prompt", ["bad", "surprise"])
async def test_a_request_that_cannot_be_prepared_harms_nobody(model: DebugPipeline, prompt: str) -> None:
    made = generator(model)
    good, bad = await asyncio.gather(
        collect(made.generate(work("good", num_inference_steps=8))), collect(made.generate(work(prompt)))
    )
    assert isinstance(good[-1], Finished)
    assert isinstance(bad[-1], Failed)
    assert isinstance(bad[-1].error, InvalidInput if prompt == "bad" else GenerationFailed)
    assert "secret" not in str(bad[-1].error)


async def test_an_image_that_breaks_leaves_its_neighbours_whole(model: DebugPipeline) -> None:
    made = generator(model)
    good, crashed = await asyncio.gather(
        collect(made.generate(work("good", num_inference_steps=6))),
        collect(made.generate(work("crash", num_inference_steps=6))),
    )
    assert model.steps_of("good") == 6
    assert isinstance(good[-1], Finished)
    assert good[-1].error is None
    assert isinstance(crashed[-1], Finished)
    assert crashed[-1].pixels is None
    assert isinstance(crashed[-1].error, GenerationFailed)


async def test_a_step_that_breaks_as_a_whole_ends_its_images_and_not_the_engine(model: DebugPipeline) -> None:
    made = generator(model)
    events = await collect(made.generate(work("explode")))
    assert isinstance(events[-1], Finished)
    assert isinstance(events[-1].error, GenerationFailed)
    assert isinstance((await collect(made.generate(work("next"))))[-1], Finished)


async def test_a_preview_that_breaks_ends_its_call_alone(model: DebugPipeline) -> None:
    made = generator(model)
    blind = collect(made.generate(work("blind", num_inference_steps=4, preview_every=1), 60.0))
    other = collect(made.generate(work("other", num_inference_steps=6, preview_every=1), 60.0))
    failed, whole = await asyncio.gather(blind, other)
    assert isinstance(failed[-1], Failed) and isinstance(failed[-1].error, GenerationFailed)
    assert "secret" not in str(failed[-1].error)
    assert [e.number for e in whole if isinstance(e, Finished)] == [0]
    assert len([e for e in whole if isinstance(e, Preview)]) == 5
    # The call that failed takes no further step, and the next one finds the thread alive.
    assert model.steps_of("blind") <= 2
    assert [e for e in await collect(made.generate(work("next"), 60.0)) if isinstance(e, Finished)]


async def test_a_picture_that_cannot_be_decoded_is_its_own_error(model: DebugPipeline) -> None:
    events = await collect(generator(model).generate(work("lost"), 60.0))
    (finished,) = [e for e in events if isinstance(e, Finished)]
    assert isinstance(finished.error, GenerationFailed) and "secret" not in str(finished.error)


@pytest.mark.parametrize("kind", [Progress, Preview, Finished])
async def test_a_caller_who_cannot_be_told_harms_nobody(model: DebugPipeline, kind: type) -> None:
    engine = Engine(model, max_batch=2, max_queued=9, max_bytes=99)

    def deaf(event: Event) -> None:
        if isinstance(event, kind):
            raise ValueError("nobody listens")

    engine.submit(work("deaf", num_inference_steps=3, preview_every=1), deaf)
    heard: list[Event] = []
    engine.submit(work("heard", num_inference_steps=3), heard.append)
    await until(lambda: any(isinstance(event, Finished) for event in heard))
    # It waits for both threads, which would not end were one of them dead or a job left over.
    await asyncio.to_thread(engine.close)


async def test_an_engine_that_breaks_between_two_steps_fails_its_calls_and_goes_on(
    model: DebugPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generator(model)
    model.hold()
    call = asyncio.create_task(collect(made.generate(work("a"), 60.0)))
    await begun(model)

    def broken() -> None:
        monkeypatch.undo()
        raise IndexError("/secret/path")

    monkeypatch.setattr(made._engine, "_admit", broken)
    model.release()
    (*_, last) = await call
    assert isinstance(last, Failed) and isinstance(last.error, GenerationFailed)
    assert [e for e in await collect(made.generate(work("next"), 60.0)) if isinstance(e, Finished)]


async def test_twenty_cancelled_calls_leave_nothing_behind(model: DebugPipeline) -> None:
    made = generator(model)
    threads = threading.active_count()
    for i in range(20):
        async with aclosing(made.generate(work(f"call {i}", 1, 2, num_inference_steps=1000))) as stream:
            async for _ in stream:
                break
    await collect(made.generate(work("last")))
    await until(lambda: not made._engine._jobs)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, DebugSample) and thing.steps == 1000]
    assert threading.active_count() <= threads + 1
    assert made._engine._active == []


async def test_each_step_is_recorded_once(model: DebugPipeline) -> None:
    made = generator(model)
    records = [
        record
        async for message in made.generate(work("a", 1, 2, num_inference_steps=5))
        for record in message.records
    ]
    records += made._engine.take_records()
    assert [record.items for record in records] == [2] * 5


async def test_closing_finishes_what_is_there_and_takes_no_more(model: DebugPipeline) -> None:
    made = generator(model)
    model.hold()
    call = asyncio.create_task(collect(made.generate(work("a"))))
    await begun(model)
    closing = asyncio.create_task(made.close())
    await until(lambda: made._engine._closed)
    with pytest.raises(BatcherClosed):
        await collect(made.generate(work("b")))
    model.release()
    assert isinstance((await call)[-1], Finished)
    await asyncio.wait_for(closing, PATIENCE_S)


@pytest.mark.parametrize(("own", "threads"), [(0, 3), (2, 2)], ids=["as the towers", "its own"])
def test_a_pipeline_runs_on_the_threads_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, own: int, threads: int
) -> None:
    class Loaded(Exception):
        pass

    def load(_: Any, **options: Any) -> None:
        raise Loaded(options["threads"])

    monkeypatch.setattr(Imaging, "load", load)
    bundle: Any = None
    with pytest.raises(Loaded, match=f"^{threads}$"):
        PipelineModel(bundle, Settings(threads=3, generator_threads=own))


async def test_one_who_fills_the_queue_leaves_the_next_free_place_to_another(model: DebugPipeline) -> None:
    made = generator(model)
    model.hold()
    bulk = [
        asyncio.create_task(
            collect(made.generate(work("bulk", *range(16), num_inference_steps=50, caller="bulk")))
        )
        for _ in range(4)
    ]
    await begun(model)
    model.entered.release()
    # The first images of the bulk have all places, and the rest of it waits.
    for _ in range(49):
        await asyncio.to_thread(model.let_one_step)
    single = asyncio.create_task(
        collect(made.generate(work("single", num_inference_steps=3, caller="single")))
    )
    await until(lambda: "single" in model.prepared)
    model.release()
    await single
    # The prepared image joins the first batch that has places; one more step at most may have been on its way.
    joined = next(i for i, batch in enumerate(model.batches) if "single" in batch)
    freed = next(i for i, batch in enumerate(model.batches) if i >= 50)
    assert joined <= freed + 2
    for task in bulk:
        task.cancel()
    await asyncio.gather(*bulk, return_exceptions=True)
    await made.close()


async def test_a_full_queue_still_takes_a_few_images_of_another(model: DebugPipeline) -> None:
    made = generator(model, max_queued_images=16, max_batch_images=1)
    model.hold()
    bulk = asyncio.create_task(collect(made.generate(work("bulk", *range(16), caller="bulk"))))
    await begun(model)
    more = asyncio.create_task(collect(made.generate(work("more", 1, caller="bulk"))))
    with pytest.raises(QueueFull):
        await collect(made.generate(work("bulk", 1, 2, caller="bulk")))
    with pytest.raises(QueueFull):
        await collect(made.generate(work("large", 1, 2, 3, caller="other")))
    other = asyncio.create_task(collect(made.generate(work("other", 1, 2, caller="other"))))
    await until(lambda: "other" in model.prepared)
    model.release()
    for task in (bulk, more, other):
        assert any(isinstance(event, Finished) for event in await task)
    # The bulk's first image has its four steps; the next place is the other's.
    order = [batch[0] for batch in model.batches]
    assert order.index("other") == 4
    await made.close()
