"""What of this machine a process may use: CPUs, the cores behind them, and a container's share of their time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


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


def cpu_quota(root: Path = _CGROUP, own: Path = _OWN_CGROUP) -> int | None:
    """Return how many CPUs' time a container may use, rounded up; None without a limit.

    The limit is not in the affinity: more threads than it allows are all stopped for the rest of each period.

    Parameters
    ----------
    root
        Where cgroups are mounted, of version 1 or 2.
    own
        File that says which of them this process is in. Limits of those above hold as well.
    """
    quotas = [_quota(group) for group in _groups(root, own)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path, own: Path) -> list[Path]:
    """Return the directories of the cgroups that limit this process's time."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    # A container's own view of the tree may begin at its group, whatever the path says: then only the root is there.
    found = [root, root / "cpu"]
    for line in lines:
        if len(line) == 3 and (line[1] == "" or "cpu" in line[1].split(",")):
            group = PurePosixPath(line[2].lstrip("/"))
            mounted = root if line[1] == "" else root / "cpu"
            found += [mounted / above for above in (group, *group.parents) if str(above) != "."]
    return found


def _quota(group: Path) -> int | None:
    """Return the limit of one cgroup, in CPUs."""
    try:
        # Version 2 of cgroups, then version 1.
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        if limit in ("max", "-1"):
            return None
        return max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def usable_cores(root: Path = _CGROUP, own: Path = _OWN_CGROUP) -> int:
    """Return how many threads may compute at once: the CPUs this process may run on, within its container's limit."""
    return thread_counts(len(usable_cpus()), 1, cpu_quota(root, own))[-1]


def thread_counts(cpus: int, cores: int, quota: int | None) -> list[int]:
    """Return the numbers of threads worth trying, ascending: all CPUs, one a core, and no more than the quota."""
    most = cpus if quota is None else min(cpus, quota)
    return sorted({most, min(cores, most)})
