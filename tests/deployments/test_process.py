"""What a replica does to its own process."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from deployments.process import computing_thread, give_way


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
