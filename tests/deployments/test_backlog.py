"""Who is let in, by the wait before them; and that callers share a batch evenly."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from deployments.batching import GreedyBatcher, QueueFull
from deployments.gateway.backlog import Backlog


def admit(backlog: Backlog, stack: ExitStack, items: int, stream: object = None, times: int = 1) -> int:
    """Return how many of `times` requests of `items` are let in."""
    entered = 0
    for _ in range(times):
        try:
            stack.enter_context(backlog.admitted(items, stream))
            entered += 1
        except QueueFull:
            pass
    return entered


def test_one_forwards_worth_of_singles_is_let_in_and_the_next_refused() -> None:
    with ExitStack() as stack:
        assert admit(Backlog(1_000, 0.1, 32), stack, 1, times=50) == 32


def test_a_fast_model_lets_more_in_by_the_time_they_would_wait() -> None:
    backlog = Backlog(1_000, 0.1, 32)
    for _ in range(50):
        backlog.observe(32, 0.032)
    assert backlog.items_per_s == pytest.approx(1_000)
    with ExitStack() as stack:
        # 0.1 s at 1,000 items/s.
        assert admit(backlog, stack, 1, times=500) == 100


def test_batches_of_one_say_little_about_the_speed_of_full_ones() -> None:
    backlog = Backlog(1_000, 0.1, 32)
    for _ in range(50):
        backlog.observe(32, 0.032)
    backlog.observe(1, 0.01)
    assert backlog.items_per_s == pytest.approx(1_000, rel=0.01)


def test_replicas_add_up() -> None:
    backlog = Backlog(1_000, 0.1, 32)
    backlog.observe(32, 0.32)
    backlog.replicas = 3
    assert backlog.items_per_s == pytest.approx(300)


def test_bulk_callers_keep_no_single_out_and_four_of_them_share() -> None:
    backlog = Backlog(1_024, 0.1, 32)
    with ExitStack() as stack:
        assert admit(backlog, stack, 256, times=6) == 4
        # Before a single stand four items, one of each bulk caller.
        assert backlog.before(1) == 4
    with ExitStack() as stack:
        assert admit(backlog, stack, 200, times=4) == 4
        assert admit(backlog, stack, 1, times=28) == 28


def test_a_stream_weighs_as_one_caller_and_waits_within_half_of_the_room() -> None:
    backlog = Backlog(100, 0.1, 32)
    with ExitStack() as stack:
        assert admit(backlog, stack, 1, "stream", times=80) == 50
        assert backlog.before(1) == 1
        assert admit(backlog, stack, 1, times=10) == 10
        assert admit(backlog, stack, 1, "other", times=1) == 0


def test_the_room_is_bounded_but_an_oversized_request_runs_alone() -> None:
    backlog = Backlog(100, 0.1, 32)
    with ExitStack() as stack:
        assert admit(backlog, stack, 256) == 1
        assert admit(backlog, stack, 1) == 0
    assert backlog.items == 0
    with ExitStack() as stack:
        assert admit(backlog, stack, 1) == 1


async def test_a_single_is_in_the_next_batch_whatever_a_stream_has_queued() -> None:
    batches: list[list[str]] = []
    going = asyncio.Event()

    async def run(items: list[str]) -> list[str]:
        batches.append(items)
        await going.wait()
        return items

    batcher: GreedyBatcher[str, str] = GreedyBatcher(run, max_batch=8, max_queued=1_000)
    first = asyncio.create_task(batcher.submit(["first"]))
    await asyncio.sleep(0.01)
    stream = [asyncio.create_task(batcher.submit([f"s{n}"], caller="stream")) for n in range(100)]
    bulk = asyncio.create_task(batcher.submit([f"b{n}" for n in range(100)]))
    await asyncio.sleep(0)
    single = asyncio.create_task(batcher.submit(["single"]))
    await asyncio.sleep(0.01)
    going.set()
    await asyncio.gather(first, single, bulk, *stream)
    assert "single" in batches[1]
    assert "b0" in batches[1] and "s0" in batches[1]
    # What is free after one item a caller goes to the oldest.
    assert batches[1] == ["s0", "b0", "single", "s1", "s2", "s3", "s4", "s5"]
