"""Finds the processes that tests started, also those whose parent is gone, and ends what they forgot."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Whatever is started by this process inherits it.
MARK = "MONOFACET_TESTS"
# Ray's agents notice late that their parent is gone.
GRACE_S = 30.0
# Python's own helpers, which end with the process that they help.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def started(value: str) -> dict[int, str]:
    """Return the living processes that inherited `MARK` with this value: process id to command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        # A zombie has neither.
        if f"{MARK}={value}".encode() in environment and not any(name in command for name in HELPERS):
            found[int(entry.name)] = command
    return found


@contextmanager
def nothing_left(grace_s: float = GRACE_S) -> Iterator[None]:
    """Fail when a process that was started within the block outlives it by `grace_s` (s), and kill it."""
    before = os.environ.get(MARK)
    value = f"{os.getpid()}-{time.monotonic_ns()}"
    os.environ[MARK] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
    deadline = time.monotonic() + grace_s
    while (left := started(value)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill(left)
    told = "\n".join(f"{pid}: {command[:200]}" for pid, command in left.items())
    assert not left, f"still running after the tests:\n{told}"


def _kill(processes: Mapping[int, str]) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
