"""Overload in simulated time: the real backlog in front of a server that batches greedily, and random arrivals."""

from __future__ import annotations

import math
import random
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import pytest

from deployments.batching import QueueFull
from deployments.gateway.admission.backlog import Backlog
from deployments.operations.settings import Settings

MAX_BATCH = 32


def _default(name: str) -> float:
    value: float = Settings.model_fields[name].default
    return value


Place = tuple[float, AbstractContextManager[None]]


@dataclass
class Server:
    """A forward of n items takes `fixed_s + item_s * n`; all that waits, up to a batch, is the next forward.

    Attributes
    ----------
    now
        Simulated seconds.
    latencies, refused
        Of the load that was last sent.
    """

    fixed_s: float
    item_s: float
    now: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        self.backlog = Backlog(
            1_024,
            _default("max_queue_s"),
            _default("overload_queue_s"),
            MAX_BATCH,
            lambda: self.now,
        )

    @property
    def capacity(self) -> float:
        """Items a second in full batches."""
        return MAX_BATCH / (self.fixed_s + self.item_s * MAX_BATCH)

    def load(self, per_s: float, seconds: float, seed: int = 0) -> None:
        """Let calls of one item arrive at random."""
        rng = random.Random(seed)
        self.latencies, self.refused = [], 0
        waiting: list[Place] = []
        running: list[Place] = []
        ends, done_at = self.now + seconds, math.inf
        arrives = self.now + rng.expovariate(per_s)
        while arrives < ends or running:
            self.now = min(arrives if arrives < ends else math.inf, done_at)
            if self.now == done_at:
                for began, place in running:
                    place.__exit__(None, None, None)
                    self.latencies.append(self.now - began)
                running, done_at = [], math.inf
            else:
                place = self.backlog.admitted(1)
                try:
                    # At the door, as the gateway asks first.
                    if self.backlog.overloaded and self.backlog.full():
                        self.backlog.refuse()
                        raise QueueFull
                    place.__enter__()
                    waiting.append((self.now, place))
                except QueueFull:
                    self.refused += 1
                arrives += rng.expovariate(per_s)
            if waiting and not running:
                running, waiting = waiting[:MAX_BATCH], waiting[MAX_BATCH:]
                done_at = self.now + self.fixed_s + self.item_s * len(running)

    def p99(self) -> float:
        return float(np.percentile(self.latencies, 99))


# What a forward costs: by the item, as on a slow CPU; half by the batch; nearly all by the batch, as on a GPU.
SERVERS = {"slow": (0.0, 0.1), "even": (0.02, 0.003), "batches": (0.03, 0.0002)}


@pytest.mark.parametrize("kind", SERVERS)
def test_at_four_times_the_capacity_the_answered_wait_little_and_the_server_stays_busy(kind: str) -> None:
    server = Server(*SERVERS[kind])
    seconds = 2_000 / server.capacity
    server.load(0.1 * server.capacity, 10 * seconds)
    assert server.refused == 0
    unloaded = server.p99()
    server.load(4 * server.capacity, 4 * seconds)
    answered, offered = len(server.latencies), len(server.latencies) + server.refused
    # Arrivals of a Poisson process: three standard errors.
    assert offered == pytest.approx(16 * 2_000, abs=3 * math.sqrt(16 * 2_000))
    assert server.p99() <= 3 * unloaded
    # A short queue fills short batches; and the nine seconds of the last kind begin with finding out how fast it is.
    least = {"slow": 0.99, "even": 0.7, "batches": 0.8}[kind]
    assert answered / (4 * seconds) >= least * server.capacity
    # Ten seconds later the refusals have faded, by e^-10, and the server is as before.
    server.load(0.1 * server.capacity, 10.0)
    server.load(0.1 * server.capacity, 10 * seconds, seed=1)
    assert server.refused == 0
    assert server.p99() <= 1.2 * unloaded


@pytest.mark.parametrize("kind", ["slow", "even"])
def test_half_of_the_capacity_is_answered_to_the_last_call(kind: str) -> None:
    server = Server(*SERVERS[kind])
    server.load(0.5 * server.capacity, 5_000 / server.capacity)
    assert server.refused == 0
