"""What a replica says of itself when it is asked: what it uses, and whether its model still gets anywhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Seconds without an answer after which a replica is hung. An event loop of a busy machine may be late by a few.
LATE_S = 8.0
# Something that runs is stuck once it takes so many times as long as the longest before it, and so many seconds.
_TIMES = 10.0
_LEAST_S = 10.0
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a replica is at.

    Attributes
    ----------
    cpu_s
        Seconds of CPU time that its process has used.
    memory_bytes, gpu_bytes
        Resident memory of its process, and what it holds of its GPU.
    stuck
        What has run for far too long; empty while nothing has.
    fault
        Why it has no model; empty while it has one.
    ready
        Whether it is done with loading, which may hold up its event loop.
    """

    cpu_s: float
    memory_bytes: int
    gpu_bytes: int = 0
    stuck: str = ""
    fault: str = ""
    ready: bool = True


class Activity:
    """Times what the threads of a replica run, to know what is stuck.

    How long a forward takes depends on the model and the machine, so the measure is the longest one before.

    Parameters
    ----------
    least_s
        Seconds before which nothing is stuck.
    clock
        Seconds, rising.
    """

    def __init__(self, least_s: float = _LEAST_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._least_s = least_s
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[object, tuple[str, float]] = {}
        self._longest: dict[str, float] = {}
        # When something last ended without an error.
        self.worked = clock()

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Time the block as one `what`; only one that does not raise says how long such a thing takes."""
        key, began = object(), self._clock()
        with self._lock:
            self._running[key] = what, began
        try:
            yield
            now = self._clock()
            with self._lock:
                self._longest[what] = max(self._longest.get(what, 0.0), now - began)
                self.worked = now
        finally:
            with self._lock:
                del self._running[key]

    @property
    def stuck(self) -> str:
        """What has run for far too long; empty while nothing has."""
        now = self._clock()
        with self._lock:
            for what, began in self._running.values():
                longest = self._longest.get(what, 0.0)
                if now - began > max(self._least_s, _TIMES * longest):
                    return f"a {what} has run for {now - began:.0f} s, the longest before for {longest:.2g} s"
        return ""


def take_pulse(activity: Activity | None = None, fault: str = "", ready: bool = True) -> Pulse:
    """Return what this process uses and is at."""
    stuck = "" if activity is None else activity.stuck
    return Pulse(time.process_time(), _resident_bytes(), _gpu_bytes(), stuck, fault, ready)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


def _gpu_bytes() -> int:
    # A process that has not imported torch holds no GPU, and need not import it for this.
    # Another thread may be importing it just now: then parts of it are missing.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    initialized = getattr(cuda, "is_initialized", None)
    return (
        int(cuda.memory_reserved()) if cuda is not None and initialized is not None and initialized() else 0
    )
