"""The contenders: how each is started, with which settings, and what it costs while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import HERE, WHERE, python
from benchmarks.peers.traffic import MODEL
from services.bundle.load import Bundle
from tests.support.ports import free_port
from tests.support.service import descendants, start_service

# Of a machine that does something else at the same time.
START_S = 900.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes
    ----------
    target
        Host and port.
    pid
        Of its first process.
    """

    target: str
    pid: int

    def cpu_s(self) -> float:
        """Return the CPU seconds that all of its processes have used."""
        total = 0
        for pid in {self.pid, *descendants(self.pid)}:
            try:
                stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            # Of the process and of its children that have ended: no time is lost with a process.
            total += sum(map(int, stat[11:15]))
        return total / _TICKS


@dataclass(frozen=True)
class Contender:
    """One way to serve the model.

    Attributes
    ----------
    peer
        Whose program: monofacet, litserve, infinity or fastapi.
    settings
        In words, for the report.
    kind
        Of the traffic.
    command
        From a free port to the command line; None for this service.
    """

    peer: str
    settings: str
    kind: str
    command: Callable[[int], list[str]] | None = None

    @property
    def name(self) -> str:
        """Peer and settings."""
        return f"{self.peer} ({self.settings})"


def contenders(bundle: Bundle, converted: Path, cores: int) -> list[Contender]:
    """Return this service by its defaults, and each peer by the settings that its documentation speaks of.

    Parameters
    ----------
    bundle
        open_clip's layout.
    converted
        transformers' layout.
    cores
        Usable ones.
    """
    clip = str((bundle.path / "clip").resolve())

    def program(environment: str, script: str, *arguments: object) -> Callable[[int], list[str]]:
        return lambda port: [
            str(python(environment)), str(HERE / script), clip, str(port), *map(str, arguments)
        ]  # fmt: skip

    def infinity(*more: str) -> Callable[[int], list[str]]:
        return lambda port: [
            str(WHERE / "infinity" / "bin" / "infinity_emb"), "v2", "--model-id", str(converted.resolve()),
            "--served-model-name", MODEL, "--engine", "torch", "--device", "cpu", "--dtype", "float32",
            "--batch-size", "32", "--no-bettertransformer", "--no-model-warmup", "--host", "127.0.0.1",
            "--port", str(port), "--log-level", "warning", *more,
        ]  # fmt: skip

    found = [
        Contender("monofacet", "defaults", "monofacet"),
        Contender(
            "litserve",
            f"1 worker, {cores} threads, batches of 32, 10 ms",
            "json",
            program("litserve", "litserve_app.py", cores, 1, 0.01),
        ),
        Contender("infinity", "torch, batches of 32", "openai", infinity("--no-compile")),
        Contender("infinity", "torch, batches of 32, compiled", "openai", infinity("--compile")),
        Contender(
            "fastapi",
            f"1 forward at once, {cores} threads",
            "json",
            program("litserve", "fastapi_app.py", cores, 1),
        ),
    ]
    if cores > 1:
        found += [
            Contender(
                "litserve",
                f"{cores} workers, 1 thread, batches of 32, 10 ms",
                "json",
                program("litserve", "litserve_app.py", 1, cores, 0.01),
            ),
            Contender(
                "fastapi",
                f"{cores} forwards at once, 1 thread",
                "json",
                program("litserve", "fastapi_app.py", 1, cores),
            ),
        ]
    return found


@contextmanager
def started(contender: Contender, bundle: Bundle, log: Path) -> Iterator[Running]:
    """Start a contender, alone on the machine, and stop it at the end."""
    if contender.command is None:
        service = start_service(bundle.path, log)
        try:
            yield Running(service.target, service.process.pid)
        finally:
            service.stop()
        return
    port = free_port()
    environment = {
        **os.environ,
        # Nothing is fetched and nothing is reported.
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            contender.command(port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        _until_healthy(port, process, log)
        yield Running(f"127.0.0.1:{port}", process.pid)
    finally:
        _stop(process)


def _until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"it did not become ready:\n{log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and all that it started."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in below:
        try:
            # Its workers have its session; a number that was given to another process since has not.
            if os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
