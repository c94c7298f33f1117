"""The gateway's watch over the replicas: one that no longer answers is told of, ended, and so replaced.

Serve routes calls to whichever replica it likes and looks at each one's health every few seconds; by itself it takes
most of a minute to give up a process that stands still. Each replica is a named actor, so the gateway asks each by
itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.cluster.handles import ModelHandle
from deployments.operations.metrics import Metrics
from deployments.operations.pulse import LATE_S, Pulse

log = logging.getLogger("monofacet.gateway")

# Seconds between two questions to a replica.
PERIOD_S = 2.0
# Seconds without an answer after which a replica is ended: more than `LATE_S`, after which it is hung, since being told
# NOT_SERVING for nothing costs less than a start of the model for nothing.
END_S = 20.0
# Seconds that a replica which answers may call its own model stuck before it is ended.
END_STUCK_S = 30.0


class Replicas(Protocol):
    """What Ray knows of the replicas; tests put their own here."""

    def names(self) -> list[str]:
        """Return the names of all replicas of the application: `<deployment>#<id>`."""
        ...

    async def ask(self, name: str) -> Pulse:
        """Return what a replica says of itself."""
        ...

    def end(self, name: str) -> None:
        """Kill a replica, stopped or not; its calls fail at once, and Serve starts another."""
        ...


@dataclass
class _Replica:
    """What is known of one replica.

    Attributes
    ----------
    name, labels
        `<deployment>#<id>`, and its two parts.
    asked, waiting
        When the question was put that waits for its answer, and what waits; None while none does.
    answered
        Whether it has answered since it is ready.
    cpu
        When it last answered, and the CPU time that it had used; None before the first answer.
    stuck, stuck_since
        What it says is stuck, and since when; empty and None while nothing is.
    fault
        Why it has no model; empty while it has one.
    ended
        Whether it was killed.
    """

    name: str
    asked: float = 0.0
    waiting: asyncio.Task[None] | None = None
    answered: bool = False
    cpu: tuple[float, float] | None = None
    stuck_since: float | None = None
    stuck: str = ""
    fault: str = ""
    ended: bool = False
    labels: tuple[str, str] = field(init=False)

    def __post_init__(self) -> None:
        deployment, _, number = self.name.partition("#")
        self.labels = deployment, number

    def silent_s(self, now: float) -> float:
        """Return how long it has owed an answer; 0 for one that is starting."""
        return now - self.asked if self.answered and self.waiting is not None else 0.0


class Watch:
    """Asks every replica of some deployments how it is.

    Parameters
    ----------
    replicas
        What Ray knows.
    handles
        By deployment; told when all replicas of it are hung.
    metrics
        Where the replicas' use is observed.
    clock
        Seconds, rising.
    """

    def __init__(
        self,
        replicas: Replicas,
        handles: Mapping[str, ModelHandle],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._handles = handles
        self._metrics = metrics
        self._clock = clock
        self._known: dict[str, _Replica] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:  # whatever Ray raises, watching must go on
                log.exception("the replicas cannot be watched")
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Look once at every replica."""
        names = {name for name in await asyncio.to_thread(self._replicas.names) if self._watched(name)}
        for name in set(self._known) - names:
            gone = self._known.pop(name)
            self._forget(gone)
            if gone.answered and not gone.ended:
                # Calls that come now wait without an error, so no handle would notice.
                self._handles[gone.labels[0]].notice(died=False)
        for name in sorted(names):
            replica = self._known.setdefault(name, _Replica(name))
            if replica.waiting is None and not replica.ended:
                replica.asked = self._clock()
                replica.waiting = asyncio.create_task(self._ask(replica))
        # Most answer within a millisecond, and are not silent then.
        waiting = [replica.waiting for replica in self._known.values() if replica.waiting is not None]
        if waiting:
            await asyncio.wait(waiting, timeout=PERIOD_S / 2)
        for replica in self._known.values():
            await self._judge(replica)
        for deployment, handle in self._handles.items():
            ours = [replica for replica in self._known.values() if replica.labels[0] == deployment]
            hung = [replica for replica in ours if self._hung(replica)]
            self._metrics.replicas_hung.labels(deployment).set(len(hung))
            faulty = sum(bool(replica.fault) for replica in ours)
            self._metrics.replicas_faulty.labels(deployment).set(faulty)
            starting = [replica for replica in ours if not replica.answered]
            await handle.set_hung(bool(hung) and len(hung) + len(starting) == len(ours))

    def _watched(self, name: str) -> bool:
        return name.partition("#")[0] in self._handles

    async def _ask(self, replica: _Replica) -> None:
        try:
            pulse = await self._replicas.ask(replica.name)
        except Exception as error:  # dead, or not constructed yet: Serve sees to both
            log.debug("%s does not say how it is: %s", replica.name, type(error).__name__)
        else:
            replica.answered |= pulse.ready
            self._observe(replica, pulse)
        finally:
            replica.waiting = None

    def _observe(self, replica: _Replica, pulse: Pulse) -> None:
        now, metrics = self._clock(), self._metrics
        if replica.cpu is not None and now > replica.cpu[0]:
            used = (pulse.cpu_s - replica.cpu[1]) / (now - replica.cpu[0])
            metrics.replica_cpus.labels(*replica.labels).set(max(0.0, used))
        replica.cpu = now, pulse.cpu_s
        metrics.replica_memory.labels(*replica.labels).set(pulse.memory_bytes)
        metrics.replica_gpu_memory.labels(*replica.labels).set(pulse.gpu_bytes)
        # Of the clock at the time of the scrape: it must grow though this very loop is held up.
        metrics.replica_silent.labels(*replica.labels).set_function(lambda: replica.silent_s(self._clock()))
        if pulse.fault and not replica.fault:
            log.error("%s has no model: %s", replica.name, pulse.fault)
        replica.fault, replica.stuck = pulse.fault, pulse.stuck
        if not pulse.stuck:
            replica.stuck_since = None
        elif replica.stuck_since is None:
            replica.stuck_since = now
            log.error("%s: %s", replica.name, pulse.stuck)

    def _hung(self, replica: _Replica) -> bool:
        return replica.ended or bool(replica.stuck) or replica.silent_s(self._clock()) > LATE_S

    async def _judge(self, replica: _Replica) -> None:
        now = self._clock()
        silent = replica.silent_s(now)
        stuck = 0.0 if replica.stuck_since is None else now - replica.stuck_since
        if replica.ended or (silent <= END_S and stuck <= END_STUCK_S):
            return
        why = f"has not answered for {silent:.0f} s" if silent > END_S else replica.stuck
        log.error("%s is ended: it %s", replica.name, why)
        # Should Ray not do it, the next look tries again.
        await asyncio.to_thread(self._replicas.end, replica.name)
        replica.ended = True
        self._handles[replica.labels[0]].notice()

    def _forget(self, replica: _Replica) -> None:
        if replica.waiting is not None:
            replica.waiting.cancel()
        metrics = self._metrics
        for gauge in (
            metrics.replica_cpus,
            metrics.replica_memory,
            metrics.replica_gpu_memory,
            metrics.replica_silent,
        ):
            try:
                gauge.remove(*replica.labels)
            except KeyError:
                continue


class RayReplicas:
    """The replicas of a Serve application, by the names that Serve gives their actors.

    Parameters
    ----------
    application
        Its name.
    """

    _NAMESPACE = "serve"

    def __init__(self, application: str) -> None:
        self._prefix = f"SERVE_REPLICA::{application}#"

    def names(self) -> list[str]:
        """See `Replicas`."""
        import ray

        actors = ray.util.list_named_actors(all_namespaces=True)
        return [
            actor["name"].removeprefix(self._prefix)
            for actor in actors
            if actor["namespace"] == self._NAMESPACE and actor["name"].startswith(self._prefix)
        ]

    async def ask(self, name: str) -> Pulse:
        """See `Replicas`."""
        actor = await asyncio.to_thread(self._actor, name)
        # Serve's own name for asking a replica of ours something without a call.
        stats: dict[str, Any] = await actor.record_routing_stats.remote()
        return Pulse(**stats)

    def end(self, name: str) -> None:
        """See `Replicas`."""
        import ray

        try:
            # Ray fails its calls at once; its process, which may be stopped, gets SIGKILL within seconds.
            ray.kill(self._actor(name), no_restart=True)
        except ValueError:
            log.debug("%s has gone by itself", name)

    def _actor(self, name: str) -> Any:
        import ray

        return ray.get_actor(self._prefix + name, namespace=self._NAMESPACE)
