"""Which backend, and how many threads, run the towers: measured on the towers themselves, when a process starts.

What is usually fastest goes first: OpenVINO on a CPU, one thread a core, no more than a container's quota. Whatever
else could be faster is tried against it for a moment, while the budget lasts, and has to be faster by `MARGIN`: a few
forwards on a machine that is starting tell no finer, and two starts, or two replicas, should agree. Nothing is
remembered on disk: it would have to be distrusted whenever machine, container or libraries change, and saves a
fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.encoding.machine import cores_of, cpu_quota, thread_counts, usable_cpus
from services.encoding.towers import Towers

# Images of a measured forward, unless one image alone fills the time of a candidate.
BATCH = 4
# Seconds of one candidate after its first forward, and of all of them together.
CANDIDATE_S = 0.1
BUDGET_S = 1.0
MARGIN = 1.15


@dataclass(frozen=True)
class Candidate:
    """One way to run the towers: a backend, "torch" or "openvino", with so many threads."""

    backend: str
    threads: int

    def __str__(self) -> str:
        """Return the candidate in words."""
        return f"{self.backend} with {self.threads} thread{'' if self.threads == 1 else 's'}"


@dataclass(frozen=True)
class Choice:
    """Which candidate was chosen, and why.

    Attributes
    ----------
    candidate : Candidate
        How the towers run.
    images_per_s : dict of Candidate to float
        Of those that were measured; empty where there was nothing to choose.
    why : str
        A sentence for the log.
    seconds : float
        What the choice cost.
    """

    candidate: Candidate
    images_per_s: dict[Candidate, float]
    why: str
    seconds: float = 0.0


def candidates(backend: str, threads: int | None, device: str, installed: str) -> list[Candidate]:
    """Return what is worth trying, the likeliest first.

    Parameters
    ----------
    backend : {"auto", "torch", "openvino"}
        "auto" leaves it open.
    threads : int or None
        None leaves it open.
    device : str
        Resolved.
    installed : str
        The backend that `choose_backend` names for the device.
    """
    if device.startswith("cuda"):
        # Threads of the host do not run the towers, and only torch has a GPU.
        return [Candidate("torch", threads or cores_of(usable_cpus()))]
    cpus = usable_cpus()
    counts = [threads] if threads else thread_counts(len(cpus), cores_of(cpus), cpu_quota())
    first = installed if backend == "auto" else backend
    found = [Candidate(first, count) for count in counts]
    if backend == "auto" and first != "torch":
        found.append(Candidate("torch", counts[0]))
    return found


def choose(
    found: list[Candidate],
    measure: Callable[[Candidate], float],
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Measure candidates in turn while the budget lasts, and choose.

    Parameters
    ----------
    found : list of Candidate
        The likeliest first; it is measured in any case where there is another.
    measure : callable
        Returns images per second.
    budget_s : float
        Seconds after which no further candidate is begun.
    clock : callable
        Returns seconds.
    """
    if len(found) == 1:
        return Choice(found[0], {}, f"{found[0]}: nothing else is left open")
    began = clock()
    speeds: dict[Candidate, float] = {}
    best = found[0]
    for candidate in found:
        if speeds and clock() - began > budget_s:
            break
        speeds[candidate] = measure(candidate)
        if speeds[candidate] > speeds[best] * MARGIN:
            best = candidate
    measured = ", ".join(f"{candidate} {speed:.1f} images/s" for candidate, speed in speeds.items())
    untried = [str(candidate) for candidate in found if candidate not in speeds]
    why = f"{best}: measured {measured}; another is taken when it is faster by {MARGIN - 1:.0%}"
    if untried:
        why += f"; not tried for want of time: {', '.join(untried)}"
    return Choice(best, speeds, why, clock() - began)


def images_per_s(towers: Towers, spend_s: float = CANDIDATE_S) -> float:
    """Return how fast the image tower is: its best forward of a few, after one that is not counted."""
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, *towers.image_size)).astype(np.float32)

    def forward(images: int) -> float:
        began = time.perf_counter()
        towers.encode_images(pixels[:images])
        return time.perf_counter() - began

    size = BATCH if forward(1) * BATCH < spend_s else 1
    if size > 1:
        forward(size)
    began = time.perf_counter()
    best = forward(size)
    while time.perf_counter() - began < spend_s:
        best = min(best, forward(size))
    return size / best
