"""Load that does not wait for its answers: calls begin at random moments at a given rate, as strangers' calls do.

A closed loop slows down with the server and so never overloads it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc import aio


@dataclass
class Outcome:
    """What became of the calls of one load.

    Attributes
    ----------
    seconds
        From the first call to the last answer.
    latencies
        Of the calls that were answered, seconds.
    codes
        How often each status came, by name.
    hints
        How many refusals carried RetryInfo.
    refused
        Seconds that each refusal took.
    late
        Seconds that each call began after its moment: how far the load generator is behind, and so sees answers late.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    hints: int = 0
    refused: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, Any]:
        """Return counts, the rate of answers (1/s) and percentiles (ms)."""
        values = np.array(self.latencies or [float("nan")]) * 1e3
        shed = np.array(self.refused or [float("nan")]) * 1e3
        late = np.array(self.late or [0.0]) * 1e3
        return {
            "calls": self.codes.total(),
            "codes": dict(self.codes),
            "answered_per_s": round(len(self.latencies) / self.seconds, 2) if self.seconds else 0.0,
            **{f"p{q}_ms": round(float(np.percentile(values, q)), 1) for q in (50, 95, 99)},
            "refused_with_retry_info": self.hints,
            "refusal_p99_ms": round(float(np.percentile(shed, 99)), 1),
            "begun_late_p99_ms": round(float(np.percentile(late, 99)), 1),
        }


def has_retry_info(error: aio.AioRpcError) -> bool:
    """Return whether a failed call says when to come back."""
    trailing = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing.get("grpc-status-details-bin", b""))
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


async def timed(call: Callable[[], Awaitable[Any]], outcome: Outcome) -> None:
    """Make one call and enter it."""
    began = time.perf_counter()
    try:
        await call()
    except aio.AioRpcError as error:
        outcome.codes[error.code().name] += 1
        outcome.refused.append(time.perf_counter() - began)
        outcome.hints += has_retry_info(error)
    else:
        outcome.codes["OK"] += 1
        outcome.latencies.append(time.perf_counter() - began)


async def open_loop(
    call: Callable[[], Awaitable[Any]], per_s: float, seconds: float, seed: int = 0
) -> Outcome:
    """Begin calls at random (a Poisson process of `per_s`) for `seconds`, and wait for all."""
    outcome, rng = Outcome(), random.Random(seed)
    started = time.perf_counter()
    due, tasks = started, set()
    while True:
        due += rng.expovariate(per_s)
        if due > started + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        outcome.late.append(max(0.0, time.perf_counter() - due))
        task = asyncio.create_task(timed(call, outcome))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    outcome.seconds = time.perf_counter() - started
    return outcome


async def closed_loop(call: Callable[[], Awaitable[Any]], callers: int, seconds: float) -> Outcome:
    """Let `callers` call one after another for `seconds`."""
    outcome = Outcome()
    started = time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() < started + seconds:
            await timed(call, outcome)

    await asyncio.gather(*(caller() for _ in range(callers)))
    outcome.seconds = time.perf_counter() - started
    return outcome
