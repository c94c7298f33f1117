"""Who is let in, by the wait before them; and that callers share a batch evenly."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from deployments.batching import GreedyBatcher, QueueFull
from deployments.gateway.admission.backlog import Backlog


def admit(
    backlog: Backlog, stack: ExitStack, items: int, stream: object = None, times: int = 1, caller: str = ""
) -> int:
    """Return how many of `times` requests of `items` are let in."""
    entered = 0
    for _ in range(times):
        try:
            stack.enter_context(backlog.admitted(items, stream, caller))
            entered += 1
        except QueueFull:
            pass
    return entered


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def backlog(clock: Clock | None = None, max_items: int = 1_000) -> Backlog:
    return Backlog(max_items, 0.2, 0.05, 32, clock or Clock())


def answer(known: Backlog, clock: Clock, items: int, per_s: float, times: int = 50) -> None:
    """Let requests of `items` be answered at `per_s` items a second, one after another."""
    for _ in range(times):
        with known.admitted(items):
            clock.now += items / per_s


def test_one_forwards_worth_of_singles_is_let_in_and_the_next_refused() -> None:
    with ExitStack() as stack:
        assert admit(backlog(), stack, 1, times=33) == 32


def test_a_fast_server_lets_more_in_by_the_time_they_would_wait() -> None:
    clock = Clock()
    known = backlog(clock)
    answer(known, clock, 32, per_s=1_000)
    assert known.items_per_s == pytest.approx(1_000)
    with ExitStack() as stack:
        # 0.2 s at 1,000 items/s.
        assert admit(known, stack, 1, times=201) == 200


def test_idle_time_says_nothing_about_the_speed() -> None:
    clock = Clock()
    known = backlog(clock)
    answer(known, clock, 1, per_s=100)
    clock.now += 60
    answer(known, clock, 1, per_s=100, times=1)
    assert known.items_per_s == pytest.approx(100)


def test_work_that_failed_is_no_answer() -> None:
    clock = Clock()
    known = backlog(clock)
    with pytest.raises(ValueError), known.admitted(1):
        clock.now += 1
        raise ValueError
    assert known.items_per_s == 0
    assert known.items == known.before(1) == 0


def test_the_speed_follows_a_server_that_slows_down() -> None:
    clock = Clock()
    known = backlog(clock)
    answer(known, clock, 1, per_s=1_000, times=5_000)
    answer(known, clock, 1, per_s=100, times=1_000)
    # Ten busy seconds are ten times what it remembers: e^-10 of the former speed is left.
    assert known.items_per_s == pytest.approx(100, rel=0.01)


def test_while_many_are_refused_the_queue_is_held_short_and_afterwards_a_burst_fits_again() -> None:
    clock = Clock()
    known = backlog(clock)
    answer(known, clock, 1, per_s=200)
    with ExitStack() as stack:
        # 0.2 s at 200 a second.
        assert admit(known, stack, 1, times=100) == 40
        assert known.overloaded and known.full()
        clock.now += 0.2
    assert not known.full()
    with ExitStack() as stack:
        # 0.05 s at 200 a second, and one for rounding.
        assert admit(known, stack, 1, times=100) in (10, 11)
    clock.now += 10
    with ExitStack() as stack:
        assert admit(known, stack, 1, times=33) >= 32
        assert not known.overloaded


def test_a_refusal_now_and_then_is_no_overload() -> None:
    clock = Clock()
    known = backlog(clock)
    for _ in range(20):
        clock.now += 0.01
        with known.admitted(1):
            pass
    known.refuse()
    known.refuse()
    assert not known.overloaded
    for _ in range(5):
        known.refuse()
    assert known.overloaded
    # Nobody came in the meantime.
    clock.now += 10
    assert not known.overloaded


def test_a_slow_server_keeps_its_pipeline_filled_while_it_is_overloaded() -> None:
    clock = Clock()
    known = backlog(clock)
    answer(known, clock, 1, per_s=2)
    with ExitStack() as stack:
        assert admit(known, stack, 1, times=60) == 32
    with ExitStack() as stack:
        assert admit(known, stack, 1, times=60) == 3


def test_a_stream_that_waits_is_no_refusal() -> None:
    known = backlog(max_items=10)
    with ExitStack() as stack:
        assert admit(known, stack, 1, "stream", times=50) == 5
        assert not known.overloaded


def test_replicas_take_a_forward_each() -> None:
    known = backlog()
    known.replicas = 3
    with ExitStack() as stack:
        assert admit(known, stack, 1, times=97) == 96


def test_bulk_callers_keep_no_single_out_and_four_of_them_share() -> None:
    known = backlog(max_items=1_024)
    with ExitStack() as stack:
        assert admit(known, stack, 256, times=6) == 4
        # Before a single stand four items, one of each bulk caller.
        assert known.before(1) == 4
    known = backlog(max_items=1_024)
    with ExitStack() as stack:
        assert admit(known, stack, 200, times=4) == 4
        assert admit(known, stack, 1, times=28) == 28


def test_a_stream_weighs_as_one_caller_and_waits_within_half_of_the_room() -> None:
    known = backlog(max_items=100)
    with ExitStack() as stack:
        assert admit(known, stack, 1, "stream", times=80) == 50
        assert known.before(1) == 1
        assert admit(known, stack, 1, times=10) == 10
        assert admit(known, stack, 1, "other", times=1) == 0


def test_a_streams_batch_of_half_the_room_enters_beside_a_few_others_and_not_beside_another() -> None:
    known = backlog(max_items=1_000)
    with ExitStack() as stack:
        assert admit(known, stack, 1, times=30) == 30
        assert admit(known, stack, 500, "pairs") == 1
        assert admit(known, stack, 500, "other") == 0
        assert admit(known, stack, 1) == 1


def test_the_room_is_bounded_but_an_oversized_request_runs_alone() -> None:
    known = backlog(max_items=100)
    with ExitStack() as stack:
        assert admit(known, stack, 256) == 1
        assert admit(known, stack, 1) == 0
    assert known.items == 0
    with ExitStack() as stack:
        assert admit(known, stack, 1) == 1


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
    stream = [asyncio.create_task(batcher.submit([f"s{n}"], request="stream")) for n in range(100)]
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


def test_before_a_callers_request_comes_as_much_of_another_caller_as_of_itself() -> None:
    known = backlog(max_items=1_024)
    with ExitStack() as stack:
        assert admit(known, stack, 1, times=30, caller="alice") == 30
        # Thirty requests of the same caller, but one of another's.
        assert known.before(1, "alice") == 30
        assert known.before(1, "bob") == 1
        assert known.before(8, "bob") == 8
        assert admit(known, stack, 8, times=1, caller="bob") == 1
        # Bob's own eight items count by request; of Alice's, as many as will then be Bob's.
        assert known.before(1, "bob") == 1 + 2
        assert known.before(100, "alice") == 30 + 8


def test_a_caller_who_fills_the_room_keeps_no_other_out() -> None:
    known = backlog(max_items=80)
    with ExitStack() as stack:
        assert admit(known, stack, 1, "stream", times=100, caller="alice") == 40
        assert admit(known, stack, 1, "stream", times=100, caller="bob") == 10
        assert admit(known, stack, 80, caller="alice") == 0
        assert admit(known, stack, 30, caller="alice") == 1
        assert admit(known, stack, 1, caller="alice") == 0
        assert admit(known, stack, 10, caller="carol") == 1


def test_twice_the_room_is_the_most_whoever_asks() -> None:
    known = backlog(max_items=8)
    with ExitStack() as stack:
        assert sum(admit(known, stack, 1, caller=f"caller {n}") for n in range(50)) == 16


async def test_callers_share_batches_evenly_however_many_requests_they_have() -> None:
    batches: list[list[str]] = []
    going = asyncio.Event()

    async def run(items: list[str]) -> list[str]:
        batches.append(items)
        await going.wait()
        return items

    batcher: GreedyBatcher[str, str] = GreedyBatcher(run, max_batch=8, max_queued=10_000)
    first = asyncio.create_task(batcher.submit(["first"], caller="alice"))
    await asyncio.sleep(0.01)
    many = [asyncio.create_task(batcher.submit(["a"], caller="alice")) for _ in range(100)]
    bulk = asyncio.create_task(batcher.submit(["b"] * 40, caller="bob"))
    await asyncio.sleep(0.01)
    going.set()
    await asyncio.gather(first, bulk, *many)
    # Half of each batch is Bob's until he is done, although a hundred requests came before his one.
    assert [batch.count("b") for batch in batches[1:11]] == [4] * 10
    assert all(batch.count("a") == 8 for batch in batches[11:18])


async def test_idle_time_gives_a_caller_no_claim_on_more_than_half() -> None:
    batches: list[list[str]] = []
    going = asyncio.Event()

    async def run(items: list[str]) -> list[str]:
        batches.append(items)
        await going.wait()
        return items

    batcher: GreedyBatcher[str, str] = GreedyBatcher(run, max_batch=4, max_queued=10_000)
    going.set()
    await batcher.submit(["a"] * 400, caller="alice")
    batches.clear()
    going.clear()
    first = asyncio.create_task(batcher.submit(["a"], caller="alice"))
    await asyncio.sleep(0.01)
    both = [asyncio.create_task(batcher.submit([c] * 20, caller=c)) for c in "ab"]
    await asyncio.sleep(0.01)
    going.set()
    await asyncio.gather(first, *both)
    assert [batch.count("b") for batch in batches[1:]] == [2] * 10
