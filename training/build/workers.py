"""Work dealt to processes of one thread each, so that results do not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
Tell = Callable[[float], None]
# How often the main process looks what its workers tell, seconds.
POLL_S = 0.25
_queue: SimpleQueue[float] | None = None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with so many threads of PyTorch and of the libraries below it and numpy."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def tell(amount: float) -> None:
    """Tell the main process how much more is done; the unit is the caller's."""
    if _queue is not None:
        _queue.put(amount)


def _start(queue: SimpleQueue[float]) -> None:
    global _queue
    _queue = queue
    # Ctrl-C reaches the whole group; the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    threadpool_limits(1)


def _end_with_parent() -> None:
    """End this process when the main one was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def run_all(
    work: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    workers: int,
    advance: Tell,
    finished: Callable[[int, T], None] = lambda number, result: None,
) -> list[T]:
    """Run `work(*arguments[i], tell)` for every i, and return the results in order.

    Parameters
    ----------
    work : callable
        At module level, so that a process can find it; its last argument is called with how much more is done.
    arguments : sequence of tuple
        One a call.
    workers : int
        Processes; with one, or with one call, this process does the work itself, with one thread as well.
    advance : callable
        Told what the calls tell.
    finished : callable
        Told each call's number and result as soon as it is there.
    """
    if min(workers, len(arguments)) <= 1:
        results = []
        with threads(1):
            for number, some in enumerate(arguments):
                results.append(work(*some, advance))
                finished(number, results[-1])
        return results
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[float] = context.SimpleQueue()
    pool = ProcessPoolExecutor(
        min(workers, len(arguments)), mp_context=context, initializer=_start, initargs=(queue,)
    )
    futures: list[Future[T]] = []
    try:
        futures = [pool.submit(work, *some, tell) for some in arguments]
        number = {future: i for i, future in enumerate(futures)}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
            while not queue.empty():
                advance(queue.get())
            for future in done:
                finished(number[future], future.result())
        return [future.result() for future in futures]
    except BaseException:
        # What is under way is lost in any case, and would be waited for.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
