"""The greedy batcher: everything that queued while the previous batch ran is the next batch.

It knows nothing of models. It adds no wait, so a lone caller pays nothing for it; under load the running
batch is the wait, and batches grow by themselves. Work whose caller has gone, or whose deadline passed,
is dropped before it runs. A ticket is what was submitted at once: one item or hundreds. Callers share
batches item by item, and so do the requests of one caller.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deployments.shares import Shares

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """The queue cannot hold the submitted items; nothing was queued."""


class DeadlineExpired(Exception):
    """The deadline passed before every item of the ticket had started."""


class BatcherClosed(Exception):
    """The batcher no longer takes work."""


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch that a model ran: its items and its seconds."""

    items: int
    seconds: float


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
    request: object
    caller: str
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
        self._shares = Shares()
        self._cancel_abandoned = cancel_abandoned
        self._running: dict[asyncio.Task[None], _Batch[Item, Result]] = {}
        self._wakeup: asyncio.Handle | None = None
        self._closed = False

    @property
    def queued(self) -> int:
        """Weight of the items that wait."""
        return self._queued

    async def submit(
        self,
        items: Sequence[Item],
        *,
        deadline: float | None = None,
        request: object = None,
        caller: str = "",
    ) -> Outcome[Result]:
        """Queue items and wait for their results.

        Cancelling the caller abandons what has not started yet.

        Parameters
        ----------
        items
            At least one item.
        deadline
            Time of the event loop's clock (`loop.time()`, seconds) after which no item may start.
        request
            What the items are part of, where one request submits many tickets, as a stream does; tickets without one
            are each a request of their own.
        caller
            Whose request it is. Callers who wait get even shares, however many requests they have.

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
            request if request is not None else object(),
            caller,
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
        """Fill a batch: the next item is always of the caller who has had least."""
        self._prune(now)
        batch: _Batch[Item, Result] = _Batch()
        waiting: dict[str, list[_Ticket[Item, Result]]] = {}
        for ticket in self._tickets:
            waiting.setdefault(ticket.caller, []).append(ticket)
        turns = {caller: self._taking(batch, tickets) for caller, tickets in waiting.items()}
        while turns:
            # `min` takes the first of equals, which is the caller who came first.
            caller = min(turns, key=self._shares.had)
            weight = next(turns[caller], None)
            if weight is None:
                del turns[caller]
            else:
                self._shares.charge(caller, weight)
        self._tickets = deque(t for t in self._tickets if t.next < len(t.items))
        for ticket in {entry[0] for entry in batch.entries}:
            if ticket.started is None:
                ticket.started = now
        return batch

    def _taking(self, batch: _Batch[Item, Result], tickets: Sequence[_Ticket[Item, Result]]) -> Iterator[int]:
        """Take one caller's items into a batch one by one, and yield their weights.

        Until the batch is half full, one item a request, oldest first, then in order of arrival. The first keeps a
        request of hundreds from holding back single items; the second finishes tickets one after another, so that
        they do not all wait for the same moment.
        """
        requests: set[object] = set()
        for ticket in tickets:
            if ticket.request in requests:
                continue
            requests.add(ticket.request)
            before = batch.weight
            if before * 2 >= self.max_batch or not self._take(batch, ticket):
                break
            yield batch.weight - before
        for ticket in tickets:
            while ticket.next < len(ticket.items):
                before = batch.weight
                if not self._take(batch, ticket):
                    return
                yield batch.weight - before

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
