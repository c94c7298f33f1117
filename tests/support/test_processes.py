"""A process that a test forgot is found and named, and one that ends in time is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import nothing_left
from tests.support.waiting import PATIENCE_S

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_a_process_that_is_left_is_named_and_ended() -> None:
    with pytest.raises(AssertionError, match="time.sleep"), nothing_left(grace_s=0.2):
        process = subprocess.Popen(SLEEP)
    assert process.wait(PATIENCE_S) == -9


def test_one_whose_parent_is_gone_is_found_too() -> None:
    script = f"import subprocess; print(subprocess.Popen({SLEEP!r}, stdout=-3, stderr=-3).pid)"
    with pytest.raises(AssertionError) as caught, nothing_left(grace_s=0.2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"{done.stdout.strip()}: " in str(caught.value)


def test_one_that_ends_in_time_is_nobody_s_fault() -> None:
    with nothing_left(grace_s=60):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    assert process.wait(PATIENCE_S) == 0


def test_sigterm_ends_what_a_process_started_before_the_process() -> None:
    script = f"""
import subprocess
from tests.support.service import unwind_on_sigterm
unwind_on_sigterm()
child = subprocess.Popen({SLEEP!r})
try:
    print(child.pid, flush=True)
    child.wait()
finally:
    child.kill()
    child.wait()
    print("ended", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "ended\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
