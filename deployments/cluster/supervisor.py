"""Runs the server in a child process, so that every way to its end is the same one and leaves nothing behind.

The process that the user started does nothing but wait: for signals, and for the child. Python gives signals back their
default actions while an interpreter ends, Ray puts handlers of its own in place, and its native code may end a process
without a word; none of it happens here. Linux hands all orphans below this process to it, so that it finds what Ray
leaves. When this process is killed, the child sees the socket between them close and does the same.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

# What the child returns when another try may help.
TRY_AGAIN = 75
INTERRUPTED = 130
_ATTEMPTS = 3
_STOP, _SERVING = b"s", b"r"
# Linux: orphans below become children of the process that asks for it.
_PR_SET_CHILD_SUBREAPER = 36
# Seconds in which a child that was told to stop while it started has to have ended.
_STARTING_S = 5.0
# Of a terminal's Ctrl-C, this one ends everything at once.
_AT_ONCE = 3

Say = Callable[[str], None]


class Signals:
    """SIGTERM, SIGINT and SIGHUP: noted, whenever they come and however often, for `supervise` to look at.

    As a context manager it gives them back: to a caller who goes on because there was nothing to supervise.
    """

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        # Handlers and not a mask: threads that libraries have started already would still be interrupted.
        self._former_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.stopping = [signal.SIGTERM, signal.SIGINT]
        # As `nohup` sets it.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.stopping.append(signal.SIGHUP)
        self._former = {number: signal.signal(number, _note) for number in (*self.stopping, signal.SIGCHLD)}

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._former_wakeup)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self.reader.close()
        self._writer.close()

    def taken(self) -> list[int]:
        """Return those that came since the last call and that ask to stop."""
        with suppress(BlockingIOError):
            return [number for number in self.reader.recv(4096) if number in self.stopping]
        return []

    def ignore(self) -> None:
        """Ignore signals from here on: the process is about to end."""
        signal.set_wakeup_fd(-1)
        for number in self.stopping:
            signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wakeup descriptor has the number of the signal."""


class Link:
    """The child's end of the socket to the process that watches over it.

    Parameters
    ----------
    end
        The socket.
    alone
        What to do once that process is gone, before this one ends.
    """

    def __init__(self, end: socket.socket, alone: Callable[[], None]) -> None:
        self._end, self._alone = end, alone
        self._stopping = threading.Event()
        # A signal's handler may interrupt whoever holds it.
        self._lock = threading.RLock()
        self._serving = False
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def serving(self) -> None:
        """From here on there are calls to be finished before the end."""
        with self._lock:
            self._serving = True
            self._end.send(_SERVING)

    def wait(self) -> None:
        """Block until the server has to stop."""
        self._stopping.wait()

    def stop(self) -> None:
        """Stop: at once while starting, else `wait` returns."""
        with self._lock:
            if not self._serving:
                os._exit(0)
        self._stopping.set()

    def _listen(self) -> None:
        with suppress(OSError):
            while self._end.recv(1):
                self.stop()
        end_descendants()
        self._alone()
        os._exit(1)


def supervise(
    run: Callable[[Link], int], signals: Signals, say: Say, alone: Callable[[], None], patience_s: float
) -> int:
    """Run the server in a child until it ends or a signal says so; then nothing that it started is left.

    Parameters
    ----------
    run
        The server. Returns its exit code, or `TRY_AGAIN`.
    signals
        Those that stop it.
    say
        Tells the user.
    alone
        What the child does before it ends when this process was killed.
    patience_s
        Seconds that the child may take to finish calls.

    Returns
    -------
    Exit code: 0 when a signal asked for it.
    """
    _adopt_orphans()
    for attempt in range(1, _ATTEMPTS + 1):
        code = _Child(run, alone).watch(signals, say, patience_s)
        end_descendants()
        if code != TRY_AGAIN:
            return code
        if attempt < _ATTEMPTS:
            say("starting again")
    return 1


class _Child:
    """The process that runs the server."""

    def __init__(self, run: Callable[[Link], int], alone: Callable[[], None]) -> None:
        self._end, other = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        self._id = os.fork()
        if self._id == 0:
            self._end.close()
            _run(run, other, alone)
        other.close()
        self._serving = self._killed = False
        self._deadline = float("inf")
        self._interrupts = 0
        self._stopping = False

    def watch(self, signals: Signals, say: Say, patience_s: float) -> int:
        """Pass on what signals ask for until the child has ended; return what that means as an exit code."""
        ends = [signals.reader, self._end]
        while True:
            for number in signals.taken():
                self._ask(number, say, patience_s)
            status = self._reap()
            if status is not None:
                break
            if time.monotonic() > self._deadline:
                self._kill()
            ready, _, _ = select.select(ends, [], [], 1.0)
            if self._end in ready:
                with suppress(OSError):
                    self._serving = self._end.recv(1) == _SERVING
                # It has said that it serves, or is gone: either way there is nothing more to read.
                ends = [signals.reader]
        self._end.close()
        code = os.waitstatus_to_exitcode(status)
        if self._interrupts >= _AT_ONCE:
            return INTERRUPTED
        if self._stopping:
            if code and self._serving:
                say("some calls were cut off")
            return 0
        if code < 0:
            say(f"the server was ended by signal {-code} ({signal.Signals(-code).name})")
            return 1
        return code

    def _ask(self, number: int, say: Say, patience_s: float) -> None:
        terminal = number == signal.SIGINT and os.isatty(0)
        self._interrupts += terminal
        if not self._stopping:
            self._stopping = True
            how = "; a third Ctrl-C ends them at once" if terminal else ""
            say(f"stopping; calls in flight are finished first{how}" if self._serving else "stopping")
            self._deadline = time.monotonic() + (patience_s if self._serving else _STARTING_S)
            with suppress(OSError):
                self._end.send(_STOP)
        elif self._interrupts >= _AT_ONCE:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._id, signal.SIGKILL)

    def _reap(self) -> int | None:
        """Bury whatever has ended; return the child's status once it is among them."""
        with suppress(ChildProcessError):
            while True:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if ended == self._id:
                    return status
                if ended == 0:
                    break
        return None


def _run(run: Callable[[Link], int], end: socket.socket, alone: Callable[[], None]) -> None:
    """Run the server, in the child process; never returns."""
    code = 1
    try:
        # Out of the terminal's reach: its Ctrl-C and its end go to the process that watches, and so do signals that
        # `timeout` or a shell send to a whole group. Ray's processes would not survive them.
        os.setsid()
        _adopt_orphans()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        link = Link(end, alone)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: link.stop())
        code = run(link)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"monofacet: cannot go on: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(patience_s: float = 30.0) -> None:
    """Kill whatever is below this process, until there is nothing, or only what the kernel does not let go."""
    until = time.monotonic() + patience_s
    while (below := descendants(os.getpid())) and time.monotonic() < until:
        for pid in below:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes below `pid`, those that have ended and wait for their parent included."""
    children: dict[int, set[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with (
                suppress(OSError),
                open(f"/proc/{entry.name}/stat", encoding="utf-8", errors="replace") as file,
            ):
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, set()).add(int(entry.name))
    found: set[int] = set()
    frontier = {pid}
    while frontier:
        frontier = {child for parent in frontier for child in children.get(parent, ())} - found
        found |= frontier
    return found
