"""The greedy batcher: everything that queued while the previous batch ran is the next batch.

It knows nothing of models. It adds no wait, so a lone caller pays nothing for it; under load the running
batch is the wait, and batches grow by themselves. Work whose caller has gone, or whose deadline passed,
is dropped before it runs. A ticket is what one caller submitted: one item or hundreds, and callers share
batches item by item.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """The queue cannot hold the submitted items; nothing was queued."""


class DeadlineExpired(Exception):
    """The deadline passed before every item of the ticket had started."""


class BatcherClosed(Exception):
    """The batcher no longer takes work."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """What became of one ticket.

    Attributes
    ----------
    results
        One result an item, in the order submitted.
    queue_s
        Seconds from submission to the start of the first batch that held one of the items.
    run_s
        Seconds spent in the batches that held the items, whole batches counted.
    """

    results: list[Result]
    queue_s: float
    run_s: float


@dataclass(slots=True, eq=False)
class _Ticket(Generic[Item, Result]):
    items: Sequence[Item]
    results: list[Result | None]
    done: asyncio.Future[None]
    deadline: float | None
    submitted: float
    caller: object
    next: int = 0
    unfinished: int = 0
    started: float | None = None
    run_s: float = 0.0


@dataclass(slots=True)
class _Batch(Generic[Item, Result]):
    entries: list[tuple[_Ticket[Item, Result], int]] = field(default_factory=list)
    weight: int = 0


class GreedyBatcher(Generic[Item, Result]):
    """Batches what waits, runs it, and gives each ticket its own results.

    Parameters
    ----------
    run
        Computes one batch: a list of items in, one result an item out, same order. An exception fails every
        ticket of the batch.
    max_batch
        Weight of one batch; may be changed later. An item heavier than that still runs, alone.
    max_queued
        Weight that may wait; a submission that would pass it is refused with `QueueFull`.
    concurrency
        Batches that may run at once; may be changed later.
    weigh
        Weight of an item; 1 by default.
    cancel_abandoned
        Cancel a running batch once every one of its callers has gone. For a `run` that passes the
        cancellation on to where the work waits; a forward that has begun cannot be stopped.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        max_batch: int,
        max_queued: int,
        concurrency: int = 1,
        weigh: Callable[[Item], int] = lambda _: 1,
        cancel_abandoned: bool = False,
    ) -> None:
        self._run = run
        self.max_batch = max_batch
        self._max_queued = max_queued
        self.concurrency = concurrency
        self._weigh = weigh
        self._tickets: deque[_Ticket[Item, Result]] = deque()
        self._queued = 0
        self._cancel_abandoned = cancel_abandoned
        self._running: dict[asyncio.Task[None], _Batch[Item, Result]] = {}
        self._wakeup: asyncio.Handle | None = None
        self._closed = False

    @property
    def queued(self) -> int:
        """Weight of the items that wait."""
        return self._queued

    async def submit(
        self, items: Sequence[Item], *, deadline: float | None = None, caller: object = None
    ) -> Outcome[Result]:
        """Queue the items of one caller and wait for their results.

        Cancelling the caller abandons what has not started yet.

        Parameters
        ----------
        items
            At least one item.
        deadline
            Time of the event loop's clock (`loop.time()`, seconds) after which no item may start.
        caller
            Whose it is, where one caller submits many tickets, as a stream does; tickets without one are each
            a caller of their own.

        Raises
        ------
        QueueFull
            At once, when the queue cannot hold the items.
        DeadlineExpired
            When the deadline passed before every item had started.
        BatcherClosed
            After `close`.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            raise BatcherClosed
        if not items:
            return Outcome([], 0.0, 0.0)
        weight = sum(map(self._weigh, items))
        # An oversized ticket is let into an empty queue: refusing it would refuse it for ever.
        if self._queued and self._queued + weight > self._max_queued:
            self._prune(loop.time())
            if self._queued and self._queued + weight > self._max_queued:
                raise QueueFull
        ticket: _Ticket[Item, Result] = _Ticket(
            items,
            [None] * len(items),
            loop.create_future(),
            deadline,
            loop.time(),
            caller if caller is not None else object(),
            unfinished=len(items),
        )
        self._tickets.append(ticket)
        self._queued += weight
        self._wake(loop)
        try:
            await ticket.done
        finally:
            # A cancelled caller leaves `done` cancelled, and `_prune` drops the rest of its items.
            if ticket.next < len(items):
                self._prune(loop.time())
            if self._cancel_abandoned and ticket.done.cancelled():
                self._cancel_batches()
        results: list[Result] = ticket.results  # type: ignore[assignment]
        started = ticket.submitted if ticket.started is None else ticket.started
        return Outcome(results, started - ticket.submitted, ticket.run_s)

    async def close(self) -> None:
        """Take no more work and wait for what was queued."""
        self._closed = True
        while self._tickets or self._running:
            self._start()
            if self._running:
                await asyncio.wait(list(self._running))

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        # One turn of the event loop later, so that callers who arrived in the same turn share a batch.
        if self._wakeup is None and len(self._running) < self.concurrency:
            self._wakeup = loop.call_soon(self._start)

    def _start(self) -> None:
        self._wakeup = None
        loop = asyncio.get_running_loop()
        while len(self._running) < self.concurrency:
            batch = self._next_batch(loop.time())
            if not batch.entries:
                return
            task = loop.create_task(self._run_batch(batch))
            self._running[task] = batch
            # Not in a `finally` of the task: a task cancelled before its first step runs none.
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._start()

    def _cancel_batches(self) -> None:
        for task, batch in self._running.items():
            if all(ticket.done.cancelled() for ticket, _ in batch.entries):
                task.cancel()

    def _next_batch(self, now: float) -> _Batch[Item, Result]:
        """Fill a batch: half of it one item a caller, oldest first, the rest in order of arrival.

        The first half keeps a caller of hundreds from holding back single items; the second half finishes
        tickets one after another, so that callers do not all wait for the same moment.
        """
        self._prune(now)
        batch: _Batch[Item, Result] = _Batch()
        callers: set[object] = set()
        for ticket in list(self._tickets):
            if ticket.caller in callers:
                continue
            callers.add(ticket.caller)
            if batch.weight * 2 >= self.max_batch or not self._take(batch, ticket):
                break
        for ticket in list(self._tickets):
            while ticket.next < len(ticket.items):
                if not self._take(batch, ticket):
                    break
            if ticket.next < len(ticket.items):
                break
        self._tickets = deque(t for t in self._tickets if t.next < len(t.items))
        for ticket in {entry[0] for entry in batch.entries}:
            if ticket.started is None:
                ticket.started = now
        return batch

    def _take(self, batch: _Batch[Item, Result], ticket: _Ticket[Item, Result]) -> bool:
        weight = self._weigh(ticket.items[ticket.next])
        if batch.entries and batch.weight + weight > self.max_batch:
            return False
        batch.entries.append((ticket, ticket.next))
        batch.weight += weight
        ticket.next += 1
        self._queued -= weight
        return True

    def _prune(self, now: float) -> None:
        """Drop every ticket whose caller has gone or whose deadline has passed."""
        kept: deque[_Ticket[Item, Result]] = deque()
        for ticket in self._tickets:
            if not ticket.done.done() and ticket.deadline is not None and now >= ticket.deadline:
                ticket.done.set_exception(DeadlineExpired())
            if ticket.done.done():
                self._queued -= sum(map(self._weigh, ticket.items[ticket.next :]))
                ticket.next = len(ticket.items)
            else:
                kept.append(ticket)
        self._tickets = kept

    async def _run_batch(self, batch: _Batch[Item, Result]) -> None:
        loop = asyncio.get_running_loop()
        tickets = {entry[0] for entry in batch.entries}
        started = loop.time()
        try:
            results = await self._run([ticket.items[i] for ticket, i in batch.entries])
            if len(results) != len(batch.entries):
                raise RuntimeError(f"{len(batch.entries)} items ran and {len(results)} results came back")
        except asyncio.CancelledError:
            # The batch was ended and not its callers, as when the threads below it are: none may wait for ever.
            self._fail(tickets, BatcherClosed())
            raise
        except (
            BaseException
        ) as error:  # whatever failed belongs to the callers of this batch, not to the batcher
            # A panic of a Rust library is no Exception, and would pass whatever its callers catch.
            self._fail(tickets, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            self._deliver(batch, results, tickets, loop.time() - started)

    def _fail(self, tickets: set[_Ticket[Item, Result]], error: Exception) -> None:
        for ticket in tickets:
            if not ticket.done.done():
                ticket.done.set_exception(error)

    def _deliver(
        self,
        batch: _Batch[Item, Result],
        results: Sequence[Result],
        tickets: set[_Ticket[Item, Result]],
        run_s: float,
    ) -> None:
        for (ticket, index), result in zip(batch.entries, results, strict=True):
            ticket.results[index] = result
            ticket.unfinished -= 1
        for ticket in tickets:
            ticket.run_s += run_s
            if ticket.unfinished == 0 and not ticket.done.done():
                ticket.done.set_result(None)
