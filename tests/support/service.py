"""Starts `monofacet serve` as a process of its own and ends it by its id."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from deployments.cluster.supervisor import descendants

# Ray and three Python processes that import torch, on a machine that may be busy with something else.
START_TIMEOUT_S = 420.0
STOP_TIMEOUT_S = 90.0
READY = re.compile(
    r"monofacet: ready: (?P<bundle>\S+) on (?P<target>\S+), metrics on (?P<metrics>\S+), HTTP on (?P<http>\S+),"
)


@dataclass
class Service:
    """A running service.

    Attributes
    ----------
    target
        `host:port` of the gRPC server.
    metrics_url
        Where Prometheus would scrape.
    http_url
        Where HTTP is served.
    bundle
        Id of the bundle it serves.
    process
        The `monofacet serve` process.
    log
        What it printed.
    """

    target: str
    metrics_url: str
    http_url: str
    bundle: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """Send SIGTERM, wait, and return the exit code; SIGKILL only when it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def descendants(self) -> set[int]:
        """Return the ids of the processes below the service's own, at this moment."""
        return descendants(self.process.pid)


def unwind_on_sigterm() -> None:
    """Let SIGTERM end this process through its context managers and `finally`, which stop what they started.

    Python's default ends it at once, and the service goes on without it.
    """
    unset = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if unset and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def start_service(
    bundle: Path,
    log: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    until: re.Pattern[str] = READY,
    prefix: Sequence[str] = (),
) -> Service:
    """Start a service and wait until it says that it is ready.

    Parameters
    ----------
    bundle
        Directory of the bundle.
    log
        File for what it prints.
    arguments
        More arguments of `monofacet serve`.
    environment
        More environment variables.
    until
        What to wait for in its output, if not for the line that says where it is ready.
    prefix
        A command that runs it, as `unshare -m`.

    Raises
    ------
    RuntimeError
        With its output, when it ends or does not become ready in time.
    """
    unwind_on_sigterm()
    command = [
        *prefix, sys.executable, "-c", "from monofacet.cli import main; main()",
        "serve", "--bundle", str(bundle), "--port", "0", "--metrics-port", "0", *arguments,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **(environment or {})},
            # A Ctrl-C at the test runner must not reach it: the fixture stops it in order.
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        match = until.search(log.read_text(errors="replace"))
        if match:
            found = {"target": "", "metrics": "", "http": "", "bundle": "", **match.groupdict()}
            return Service(found["target"], found["metrics"], found["http"], found["bundle"], process, log)
        time.sleep(0.1)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # The server sees that, ends itself and what it has started.
        process.kill()
        process.wait()
    raise RuntimeError(f"the service did not become ready:\n{log.read_text(errors='replace')}")


def metric(service: Service, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    page = urllib.request.urlopen(service.metrics_url).read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
