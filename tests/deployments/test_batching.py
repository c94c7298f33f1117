"""The greedy batcher against a deterministic debug model that counts what it runs."""

from __future__ import annotations

import asyncio

import pytest

from deployments.batching import BatcherClosed, DeadlineExpired, GreedyBatcher, QueueFull
from deployments.encoder.encoder import Encoder
from deployments.operations.settings import Settings
from tests.deployments.debug import DebugModel as TowerlessModel


class DebugModel:
    """Squares numbers, one batch at a time, and only when told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Semaphore(0)
        self.open = False

    @property
    def items(self) -> list[int]:
        return [item for batch in self.batches for item in batch]

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        if not self.open:
            await self.gate.acquire()
        if -1 in items:
            raise RuntimeError("the model failed")
        return [item * item for item in items]


async def settle() -> None:
    """Let everything that can happen without the model happen."""
    for _ in range(10):
        await asyncio.sleep(0)


def batcher(model: DebugModel, **kwargs: int) -> GreedyBatcher[int, int]:
    return GreedyBatcher(model, **{"max_batch": 8, "max_queued": 64, **kwargs})


async def test_a_lone_caller_runs_at_once_and_alone() -> None:
    model = DebugModel()
    model.open = True
    outcome = await batcher(model).submit([3])
    assert outcome.results == [9]
    assert model.batches == [[3]]


async def test_what_queued_while_a_batch_ran_is_the_next_batch() -> None:
    model = DebugModel()
    queue = batcher(model)
    first = asyncio.create_task(queue.submit([1]))
    await settle()
    rest = [asyncio.create_task(queue.submit([n])) for n in range(2, 7)]
    await settle()
    model.gate.release()
    await first
    model.open = True
    model.gate.release()
    assert [(await task).results for task in rest] == [[4], [9], [16], [25], [36]]
    assert model.batches == [[1], [2, 3, 4, 5, 6]]


async def test_callers_of_one_turn_share_a_batch() -> None:
    model = DebugModel()
    model.open = True
    queue = batcher(model)
    await asyncio.gather(*(queue.submit([n]) for n in range(4)))
    assert model.batches == [[0, 1, 2, 3]]


async def test_a_batch_never_passes_its_budget_and_order_is_kept() -> None:
    model = DebugModel()
    model.open = True
    outcome = await batcher(model).submit(list(range(20)))
    assert outcome.results == [n * n for n in range(20)]
    assert [len(batch) for batch in model.batches] == [8, 8, 4]


async def test_a_single_item_does_not_wait_for_a_ticket_of_hundreds() -> None:
    model = DebugModel()
    queue = batcher(model, max_queued=1000)
    large = asyncio.create_task(queue.submit(list(range(1000, 1256))))
    await settle()
    single = asyncio.create_task(queue.submit([7]))
    await settle()
    model.gate.release()
    await settle()
    assert 7 in model.batches[1]
    model.open = True
    model.gate.release()
    assert (await single).results == [49]
    assert len((await large).results) == 256


async def test_large_tickets_finish_one_after_another() -> None:
    model = DebugModel()
    model.open = True
    queue = batcher(model)
    finished: list[int] = []

    async def call(start: int) -> None:
        await queue.submit(list(range(start, start + 16)))
        finished.append(len(model.batches))

    await asyncio.gather(call(100), call(200))
    assert finished[0] < finished[1]


async def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    model = DebugModel()
    queue = batcher(model, max_queued=4)
    running = asyncio.create_task(queue.submit([1]))
    await settle()
    waiting = asyncio.create_task(queue.submit([2, 3, 4]))
    await settle()
    with pytest.raises(QueueFull):
        await queue.submit([5, 6])
    model.open = True
    model.gate.release()
    await asyncio.gather(running, waiting)
    assert (await queue.submit([5, 6])).results == [25, 36]


async def test_an_abandoned_caller_costs_no_model_time_and_frees_its_place() -> None:
    model = DebugModel()
    queue = batcher(model, max_queued=4)
    running = asyncio.create_task(queue.submit([1]))
    await settle()
    gone = asyncio.create_task(queue.submit([2, 3, 4, 5]))
    await settle()
    gone.cancel()
    await settle()
    assert queue.queued == 0
    model.open = True
    model.gate.release()
    await running
    await queue.submit([6])
    assert model.items == [1, 6]


async def test_a_caller_who_leaves_midway_stops_the_rest_of_its_items() -> None:
    model = DebugModel()
    queue = batcher(model)
    large = asyncio.create_task(queue.submit(list(range(64))))
    await settle()
    large.cancel()
    await settle()
    model.open = True
    model.gate.release()
    await queue.submit([100])
    assert len(model.items) == 8 + 1


async def test_work_past_its_deadline_costs_no_model_time() -> None:
    model = DebugModel()
    queue = batcher(model)
    running = asyncio.create_task(queue.submit([1]))
    await settle()
    loop = asyncio.get_running_loop()
    late = asyncio.create_task(queue.submit([2], deadline=loop.time()))
    in_time = asyncio.create_task(queue.submit([3], deadline=loop.time() + 60))
    await settle()
    model.open = True
    model.gate.release()
    await running
    with pytest.raises(DeadlineExpired):
        await late
    assert (await in_time).results == [9]
    assert model.items == [1, 3]


async def test_a_failing_batch_fails_its_callers_and_no_one_else() -> None:
    model = DebugModel()
    model.open = True
    queue = batcher(model)
    with pytest.raises(RuntimeError):
        await queue.submit([-1, 2])
    assert (await queue.submit([4])).results == [16]


async def test_a_model_that_loses_results_is_an_error_and_not_a_mix_up() -> None:
    async def lossy(items: list[int]) -> list[int]:
        return items[1:]

    with pytest.raises(RuntimeError, match="2 items ran and 1 results"):
        await GreedyBatcher(lossy, max_batch=8, max_queued=8).submit([1, 2])


async def test_weights_are_what_the_budget_counts() -> None:
    batches: list[list[str]] = []

    async def run(items: list[str]) -> list[str]:
        batches.append(items)
        return items

    queue: GreedyBatcher[str, str] = GreedyBatcher(run, max_batch=4, max_queued=100, weigh=len)
    await asyncio.gather(*(queue.submit([word]) for word in ["aa", "bb", "c", "dddddd", "e"]))
    assert all(sum(map(len, batch)) <= 4 or len(batch) == 1 for batch in batches)
    assert sorted(word for batch in batches for word in batch) == ["aa", "bb", "c", "dddddd", "e"]


async def test_close_finishes_what_was_queued_and_takes_no_more() -> None:
    model = DebugModel()
    queue = batcher(model)
    tasks = [asyncio.create_task(queue.submit([n])) for n in range(3)]
    await settle()
    closing = asyncio.create_task(queue.close())
    await settle()
    with pytest.raises(BatcherClosed):
        await queue.submit([9])
    model.open = True
    model.gate.release()
    await closing
    assert [(await task).results for task in tasks] == [[0], [1], [4]]


async def test_timings_tell_waiting_from_running() -> None:
    async def run(items: list[int]) -> list[int]:
        await asyncio.sleep(0.02)
        return items

    queue: GreedyBatcher[int, int] = GreedyBatcher(run, max_batch=1, max_queued=8)
    first, second = await asyncio.gather(queue.submit([1]), queue.submit([2]))
    # Both began to wait at once, one of them through the other's run; the event loop's clock may be a little early.
    assert second.queue_s - first.queue_s >= 0.015
    assert min(first.run_s, second.run_s) >= 0.015


async def test_a_running_batch_is_cancelled_once_all_its_callers_have_gone() -> None:
    model = DebugModel()
    queue: GreedyBatcher[int, int] = GreedyBatcher(model, max_batch=8, max_queued=8, cancel_abandoned=True)
    first, second = (asyncio.create_task(queue.submit([n])) for n in (1, 2))
    await settle()
    first.cancel()
    await settle()
    assert not second.done()
    second.cancel()
    await settle()
    model.open = True
    assert (await queue.submit([3])).results == [9]
    assert model.batches == [[1, 2], [3]]


async def test_batches_shrink_to_what_runs_in_time_but_not_below_what_is_efficient() -> None:
    settings = Settings(max_batch_items=32, max_batch_s=0.05)
    encoder = Encoder(settings, TowerlessModel(), {})
    try:
        for _ in range(30):
            encoder._size_batches(32, 0.032)
        assert encoder._batcher.max_batch == 32
        for _ in range(30):
            encoder._size_batches(32, 0.128)
        # 0.05 s at 4 ms an item.
        assert encoder._batcher.max_batch == pytest.approx(12, abs=1)
        for _ in range(30):
            encoder._size_batches(12, 12.0)
        assert encoder._batcher.max_batch == 8
        # A batch of one says nothing about the speed of full ones.
        for _ in range(100):
            encoder._size_batches(1, 0.0001)
        assert encoder._batcher.max_batch == 8
    finally:
        await encoder.close()
