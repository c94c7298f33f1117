"""Whatever comes, whenever and however often: the server ends in one way, and nothing of it is left."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deployments.cluster.supervisor import Signals, descendants

ROOT = Path(__file__).parents[2]
# A server in the place of the real one: it starts a process that leaves its group, and one whose parent dies.
SERVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from deployments.cluster.supervisor import TRY_AGAIN, Signals, supervise

folder, phase = Path(sys.argv[1]), sys.argv[2]
signals = Signals()

def say(line):
    print(f"test: {line}", flush=True)

def run(link):
    sleep = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    subprocess.Popen(sleep, start_new_session=True)
    orphan = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    say("up")
    if phase == "starting":
        time.sleep(600)
    if phase == "again":
        return TRY_AGAIN
    if phase == "raising":
        raise ValueError("no such thing")
    link.serving()
    say("serving")
    link.wait()
    say("draining")
    if phase == "hanging":
        time.sleep(600)
    while not (folder / "finished").exists():
        time.sleep(0.01)
    return 0

def alone():
    (folder / "here").unlink()

code = supervise(run, signals, say, alone, patience_s=1.0 if phase == "hanging" else 120.0)
signals.ignore()
say(f"ended with {code}")
while phase == "late" and not (folder / "finished-late").exists():
    time.sleep(0.01)
os._exit(code)
"""
Start = Callable[..., "Server"]


class Server:
    def __init__(self, folder: Path, phase: str, **options: object) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "here").touch()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(folder), phase],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                **{"start_new_session": True, "stdin": subprocess.DEVNULL, **options},  # type: ignore[call-overload]
            )
        self.below: dict[int, psutil.Process] = {}

    def until(self, line: str) -> None:
        """Wait until it has said a line, and note what it has started."""
        deadline = time.monotonic() + 120
        while f"test: {line}" not in self.said():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.01)
        self.below |= {pid: psutil.Process(pid) for pid in descendants(self.process.pid)}

    def said(self) -> str:
        return self.log.read_text()

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def ended(self) -> int:
        return self.process.wait(120)

    def left(self) -> list[int]:
        """Return which of the processes that it had started still live, after giving the kernel time to end them."""
        _, living = psutil.wait_procs(self.below.values(), timeout=60)
        return [process.pid for process in living]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers = []

    def starting(phase: str, **options: object) -> Server:
        servers.append(Server(tmp_path, phase, **options))
        return servers[-1]

    yield starting
    for server in servers:
        server.process.kill()
        server.process.wait()
        for process in server.below.values():
            if process.is_running():
                process.kill()


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_any_of_the_signals_drains_and_later_ones_change_nothing(start: Start, number: int) -> None:
    server = start("late")
    server.until("serving")
    assert len(server.below) == 3
    server.send(number)
    server.until("draining")
    server.send(*SIGNALS * 5)
    (server.folder / "finished").touch()
    server.until("ended")
    # The process that the user started is about to end.
    server.send(*SIGNALS * 5)
    (server.folder / "finished-late").touch()
    assert server.ended() == 0
    assert server.left() == []
    assert server.said().count("stopping; calls in flight are finished first") == 1
    assert server.said().endswith("test: ended with 0\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_start_is_broken_off_at_once(start: Start, number: int) -> None:
    server = start("starting")
    server.until("up")
    server.send(number, number)
    assert server.ended() == 0
    assert server.left() == []
    assert "test: stopping\n" in server.said()


def test_a_drain_that_hangs_is_cut_off(start: Start) -> None:
    server = start("hanging")
    server.until("serving")
    server.send(signal.SIGTERM)
    assert server.ended() == 0
    assert server.left() == []
    assert "some calls were cut off" in server.said()


@pytest.mark.parametrize("phase", ["starting", "serving"])
def test_when_the_process_that_watches_is_killed_the_server_clears_up(start: Start, phase: str) -> None:
    server = start(phase)
    server.until("up" if phase == "starting" else "serving")
    server.send(signal.SIGKILL)
    assert server.ended() == -signal.SIGKILL
    assert server.left() == []
    assert not (server.folder / "here").exists()


def test_when_the_server_is_killed_the_process_that_watches_says_so_and_clears_up(start: Start) -> None:
    server = start("serving")
    server.until("serving")
    (child,) = psutil.Process(server.process.pid).children()[:1]
    child.kill()
    assert server.ended() == 1
    assert server.left() == []
    assert "ended by signal 9 (SIGKILL)" in server.said()


def test_a_server_that_asks_for_it_is_started_again_twice(start: Start) -> None:
    server = start("again")
    assert server.ended() == 1
    assert server.said().count("test: up") == 3
    assert server.said().count("test: starting again") == 2


def test_what_nobody_expected_is_one_line_and_no_traceback(start: Start) -> None:
    server = start("raising")
    assert server.ended() == 1
    assert "monofacet: cannot go on: ValueError: no such thing\n" in server.said()
    assert "Traceback" not in server.said()


def test_nohup_is_obeyed(start: Start) -> None:
    server = start("serving", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    server.until("serving")
    server.send(signal.SIGHUP)
    time.sleep(0.2)
    assert "stopping" not in server.said()
    server.send(signal.SIGTERM)
    (server.folder / "finished").touch()
    assert server.ended() == 0


def test_a_third_ctrl_c_at_a_terminal_ends_it_at_once_and_says_so_at_the_first(start: Start) -> None:
    terminal, end = pty.openpty()
    try:
        server = start("never finished", stdin=end)
        server.until("serving")
        server.send(signal.SIGINT)
        server.until("draining")
        assert "a third Ctrl-C ends them at once" in server.said()
        while server.process.poll() is None:
            # Those that come together count once.
            server.send(signal.SIGINT)
            time.sleep(0.1)
        assert server.ended() == 130
        assert server.left() == []
    finally:
        os.close(terminal)
        os.close(end)


def test_what_another_sends_to_the_whole_group_reaches_the_server_as_one_request(start: Start) -> None:
    """As `timeout` and Ctrl-C do: what the server has started is in a session of its own."""
    server = start("serving")
    server.until("serving")
    os.killpg(server.process.pid, signal.SIGTERM)
    server.until("draining")
    assert all(os.getsid(pid) != os.getsid(server.process.pid) for pid in server.below)
    (server.folder / "finished").touch()
    assert server.ended() == 0
    assert server.said().count("stopping;") == 1


def test_signals_are_given_back_where_nothing_was_started() -> None:
    former = [signal.getsignal(number) for number in SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not (taken := signals.taken()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert taken == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in SIGNALS] == former
    assert signal.set_wakeup_fd(wakeup) == wakeup
