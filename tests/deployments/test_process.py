"""What a replica does to its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from deployments.operations.process import computing_thread, give_way


def niceness() -> int:
    """Return that of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for each thread")
def test_what_computes_gives_way_and_what_answers_does_not() -> None:
    before = niceness()
    given = min(19, before + 5)
    with computing_thread(given) as thread:
        assert thread.submit(niceness).result() == given

        def of_a_child() -> int:
            found: list[int] = []
            child = threading.Thread(target=lambda: found.append(niceness()))
            child.start()
            child.join()
            return found[0]

        # As the threads that a library starts.
        assert thread.submit(of_a_child).result() == given
    assert niceness() == before


def test_no_niceness_changes_nothing() -> None:
    before = niceness()
    give_way(0)
    assert niceness() == before


# Starts a child that says who it is once it is ready, and waits to be killed.
PARENT = """
import subprocess, sys
child = (
    "import os, time; from deployments.operations.process import end_with_ray; "
    "from deployments.operations.settings import Settings; "
    "end_with_ray(Settings(loopback_only=%s)); print(os.getpid(), flush=True); time.sleep(600)"
)
subprocess.run([sys.executable, "-c", child % sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
@pytest.mark.parametrize("loopback_only", [True, False], ids=["one machine", "cluster"])
def test_a_replica_ends_with_what_started_it_on_one_machine(loopback_only: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(loopback_only)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    try:
        _, alive = psutil.wait_procs([child], timeout=60 if loopback_only else 0.5)
        assert bool(alive) is not loopback_only
    finally:
        if child.is_running():
            child.kill()
