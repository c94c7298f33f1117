"""Two Ray nodes on this machine, a gateway and an encoder on each; one node is killed under load.

`python -m benchmarks.two_nodes`

Each node is a raylet with workers of its own. The kill is a SIGKILL of every process of the second node at once, as
when a machine loses its power. Callers know both gateways and spread their calls, as behind a headless Service.
Prints one table and writes out/bench/two_nodes.json.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import os
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from deployments.cluster.supervisor import descendants
from deployments.operations.environment import ENVIRONMENT, ONE_MACHINE
from deployments.operations.metrics import REQUEST_DURATION
from deployments.operations.settings import EMBEDDED_BUNDLE, Settings

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
# Why the call in progress was tried again, once a time.
_causes: contextvars.ContextVar[list[str]] = contextvars.ContextVar("causes")


@dataclass
class Calls:
    """What the callers saw: one entry a call."""

    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    causes: list[list[str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def metrics(self, start: float, end: float) -> dict[str, float]:
        """Return rate (1/s) and latencies (ms) of the calls that ended between two times (s)."""
        ended = np.array(self.ended)
        chosen = (ended >= start) & (ended < end)
        latencies = (ended - np.array(self.began))[chosen] * 1e3
        p50, p99 = np.percentile(latencies, (50, 99)) if chosen.any() else (np.nan, np.nan)
        return {
            "calls_per_s": float(chosen.sum() / (end - start)),
            "p50_ms": float(p50),
            "p99_ms": float(p99),
        }


@contextmanager
def two_nodes() -> Iterator[tuple[int, int]]:
    """Start a cluster of two nodes, each with room for a gateway and for two encoders; yield the raylets' ids."""
    for name, value in (ENVIRONMENT | ONE_MACHINE).items():
        os.environ.setdefault(name, value)
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "resources": {"gateway": 1, "encoder": 2}, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield tuple(n.all_processes["raylet"][0].process.pid for n in (cluster.head_node, second))
    finally:
        ray.shutdown()
        cluster.shutdown()


def replicas_below(raylet: int) -> Counter[str]:
    """Count the replicas of each deployment among the processes of one node."""
    found: Counter[str] = Counter()
    for pid in descendants(raylet):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if title.startswith("ray::ServeReplica:"):
            found[re.split(r"[.\s]", title.split(":")[4])[0]] += 1
    return found


def kill(raylet: int) -> int:
    """Kill a node's raylet and every process below it at once; return how many."""
    chosen = [raylet, *descendants(raylet)]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(chosen)


async def load(target: str, callers: int, until: float, calls: Calls) -> None:
    """Call in a closed loop until a time (s) of the monotonic clock."""
    import monofacet

    async with monofacet.AsyncClient(target, timeout=60.0, max_in_flight=callers) as client:

        async def caller(number: int) -> None:
            turn = number
            while time.monotonic() < until:
                _causes.set([])
                began = time.monotonic()
                try:
                    await client.encode([f"a red heart {turn % 97}"])
                except monofacet.MonofacetError as error:
                    calls.errors.append(f"{type(error).__name__}: {error}")
                calls.began.append(began)
                calls.ended.append(time.monotonic())
                calls.causes.append(_causes.get())
                turn += callers

        await asyncio.gather(*(caller(number) for number in range(callers)))


def note_retries() -> None:
    """Have the client's retries noted, each with its own call."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # Seconds, number of the failure, and the failure.
            assert isinstance(record.args, tuple)
            cause = record.args[-1]
            _causes.get().append(f"{type(cause).__name__}: {cause}".splitlines()[0][:120])

    logger = logging.getLogger("monofacet")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Notes())


def answered(metrics_port: int) -> int:
    """Return how many calls a gateway has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    name = f"{REQUEST_DURATION.name}_count"
    return round(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)))


async def measured(
    target: str,
    nodes: tuple[int, int],
    metrics_ports: list[int],
    callers: int,
    before_s: float,
    after_s: float,
) -> dict[str, Any]:
    """Load both gateways, kill the second node, and watch what happens to the callers."""
    calls = Calls()
    start = time.monotonic()
    loading = asyncio.create_task(load(target, callers, start + before_s + after_s, calls))
    await asyncio.sleep(before_s)
    shares = [await asyncio.to_thread(answered, port) for port in metrics_ports]
    killed_at = time.monotonic()
    processes = kill(nodes[1])
    back_at: float | None = None
    while not loading.done():
        await asyncio.sleep(0.2)
        if back_at is None and (await asyncio.to_thread(replicas_below, nodes[0]))["encoder"] == 2:
            back_at = time.monotonic()
    await loading
    ended = np.sort(np.array(calls.ended))
    around = ended[ended > killed_at - 1.0]
    retried_before = [c for e, c in zip(calls.ended, calls.causes, strict=True) if c and e < killed_at]
    retried = [causes for causes in calls.causes if causes]
    return {
        "callers": callers,
        "calls": len(calls.ended),
        "processes_killed": processes,
        "in_flight_at_the_kill": sum(
            began < killed_at < end for began, end in zip(calls.began, calls.ended, strict=True)
        ),
        "answered_by_each_gateway_before": shares,
        "retried_before": len(retried_before),
        "retried_after": len(retried) - len(retried_before),
        "retries": sum(map(len, retried)),
        "causes": dict(Counter(cause for causes in retried for cause in causes)),
        "failed": len(calls.errors),
        "errors": dict(Counter(calls.errors)),
        "before": calls.metrics(start + 2.0, killed_at),
        "after": calls.metrics(killed_at, start + before_s + after_s),
        "last_10_s": calls.metrics(start + before_s + after_s - 10.0, start + before_s + after_s),
        "longest_call_after_ms": max(
            (e - b) * 1e3 for b, e in zip(calls.began, calls.ended, strict=True) if e > killed_at
        ),
        "longest_silence_ms": float(np.diff(around).max() * 1e3),
        "second_encoder_back_s": None if back_at is None else back_at - killed_at,
    }


def table(report: dict[str, Any]) -> Table:
    """Return the figures."""
    shown = Table("what", "figure")
    shown.add_row("replicas on the first node", str(report["placement"][0]))
    shown.add_row("replicas on the second node", str(report["placement"][1]))
    for name in (
        "calls",
        "in_flight_at_the_kill",
        "retried_before",
        "retried_after",
        "retries",
        "failed",
    ):
        shown.add_row(name.replace("_", " "), str(report[name]))
    for phase in ("before", "after", "last_10_s"):
        one = report[phase]
        line = f"{one['calls_per_s']:.1f} calls/s, p50 {one['p50_ms']:.0f} ms, p99 {one['p99_ms']:.0f} ms"
        shown.add_row(phase.replace("_", " "), line)
    shown.add_row("longest call after the kill", f"{report['longest_call_after_ms']:.0f} ms")
    shown.add_row("longest silence", f"{report['longest_silence_ms']:.0f} ms")
    back = report["second_encoder_back_s"]
    shown.add_row(
        "second encoder's process is back after", "not within the run" if back is None else f"{back:.1f} s"
    )
    return shown


def main(
    callers: Annotated[int, typer.Option(help="Callers in a closed loop.")] = 16,
    before: Annotated[float, typer.Option(help="Seconds of load before the kill.")] = 15.0,
    after: Annotated[float, typer.Option(help="Seconds of load after the kill.")] = 45.0,
    bundle: Annotated[Path, typer.Option(help="What is served.")] = EMBEDDED_BUNDLE,
) -> None:
    """Measure, print the table, and write the JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    with two_nodes() as nodes:
        from ray import serve
        from ray.serve.schema import LoggingConfig

        from deployments.cluster.app import APP_NAME, build

        settings = Settings(
            bundle=bundle,
            port=0,
            metrics_port=0,
            threads=1,
            decode_threads=1,
            log_level="warning",
            gateway_replicas=2,
            gateway_resource="gateway",
            encoder_replicas=2,
            encoder_resource="encoder",
        )
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        gateway = serve.run(build(settings), name=APP_NAME, route_prefix=None, logging_config=quiet)
        ports, metrics_ports = zip(*gateway.broadcast("ports").results(), strict=True)
        if any(gateway.broadcast("warmed").results()) or len(ports) != 2:
            raise RuntimeError("the two gateways do not serve")
        placement = [dict(replicas_below(node)) for node in nodes]
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        note_retries()
        report = asyncio.run(measured(target, nodes, list(metrics_ports), callers, before, after))
    report["placement"] = placement
    (OUT / "two_nodes.json").write_text(json.dumps(report, indent=1) + "\n")
    Console(width=120).print(table(report))


if __name__ == "__main__":
    typer.run(main)
