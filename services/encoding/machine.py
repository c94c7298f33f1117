"""What of this machine a process may use: CPUs, the cores behind them, and a container's share of their time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> set[int]:
    """Return the CPUs that this process may run on, which in a container may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cores_of(cpus: Iterable[int], root: Path = _CPUS) -> int:
    """Return how many cores the CPUs are: two threads of one core share its arithmetic."""
    cores: set[str] = set()
    for cpu in cpus:
        siblings = root / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        name = str(cpu)
        with suppress(OSError):
            name = siblings.read_text().strip()
        cores.add(name)
    return max(1, len(cores))


def cpu_quota(root: Path = _CGROUP) -> int | None:
    """Return how many CPUs' time a container may use, rounded up; None without a limit.

    The limit is not in the affinity: more threads than it allows are all stopped for the rest of each period.
    """
    try:
        # Version 2 of cgroups, then version 1.
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        if limit in ("max", "-1"):
            return None
        return max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def thread_counts(cpus: int, cores: int, quota: int | None) -> list[int]:
    """Return the numbers of threads worth trying, ascending: all CPUs, one a core, and no more than the quota."""
    most = cpus if quota is None else min(cpus, quota)
    return sorted({most, min(cores, most)})
