"""The private folder of one `monofacet serve`: where it may lie, whose it is, and what dead owners have left."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from deployments.operations.logs import SOCKET_VARIABLE

PREFIX = "mf-"
# Held by the living owner. A folder without it is none of ours.
LOCK = "lock"
# Ray makes Unix sockets in it, whose paths may have 107 characters.
_RAYS = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = 107 - len(_RAYS) - len(f"/{PREFIX}01234567")
# Ray's logs; its objects too, where /dev/shm is too small for them.
_ROOM_BYTES = 64 * 1024 * 1024


class NoScratch(OSError):
    """There is nowhere to make the folder; the message says why, for each place that was tried."""


def places(environment: Mapping[str, str]) -> list[Path]:
    """Return where the folder may be made, best first.

    Parameters
    ----------
    environment
        The process's; TMPDIR is what the user wants, XDG_RUNTIME_DIR what the system made for the user.
    """
    wanted = (environment.get("TMPDIR"), "/tmp", environment.get("XDG_RUNTIME_DIR"), "/dev/shm", "/var/tmp")
    return list(dict.fromkeys(Path(os.path.abspath(place)) for place in wanted if place))


class Scratch:
    """A folder of our own, which exists until `remove`.

    Attributes
    ----------
    path
        The folder; only this user can look into it.
    passed_over
        Why each better place was not taken.
    """

    def __init__(self, path: Path, lock: int, passed_over: list[str]) -> None:
        self.path, self.passed_over = path, passed_over
        self._lock = lock

    @classmethod
    def make(cls, environment: Mapping[str, str]) -> Scratch:
        """Make the folder in the first place that will do.

        Raises
        ------
        NoScratch
            When none will.
        """
        reasons: list[str] = []
        for place in places(environment):
            if len(os.fsencode(place)) > _LONGEST:
                reasons.append(f"{place}: longer than {_LONGEST} bytes, too long for Unix sockets")
                continue
            try:
                if shutil.disk_usage(place).free < _ROOM_BYTES:
                    reasons.append(f"{place}: less than {_ROOM_BYTES // 2**20} MiB free")
                    continue
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
                lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with suppress(OSError):
                    # Waits for a sweeper that looks at it just now. Some network file systems have no locks: what is
                    # left there nobody can take for abandoned.
                    fcntl.flock(lock, fcntl.LOCK_EX)
                os.write(lock, f"{os.getpid()}\n".encode())
                return cls(path, lock, reasons)
            except OSError as error:
                reasons.append(f"{place}: {error.strerror}")
        raise NoScratch("no temporary folder can be used: " + "; ".join(reasons))

    def clear(self) -> None:
        """Remove what an earlier try has left in it."""
        for entry in self.path.iterdir():
            if entry.name == LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()

    def remove(self) -> None:
        """Remove it; what still writes into it has a few seconds to end."""
        _remove(self.path)
        with suppress(OSError):
            os.close(self._lock)


def sweep(environment: Mapping[str, str]) -> list[Path]:
    """Remove the folders whose owners died without removing them, and end the processes that they left.

    A folder of another user, of a living owner (it holds the lock), or without a lock is not touched.

    Returns
    -------
    What was removed.
    """
    swept = []
    for place in places(environment):
        with suppress(OSError):
            for path in sorted(place.glob(f"{PREFIX}*")):
                if _abandoned(path):
                    swept.append(path)
    return swept


def _abandoned(path: Path) -> bool:
    """Return whether the folder's owner had died, in which case it is gone now."""
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # An owner writes its id once it holds the lock: an empty file is that of a server which is just starting.
        if not os.fstat(lock).st_size:
            return False
        _end_marked(path)
        _remove(path)
        return not path.exists()
    except OSError:
        return False
    finally:
        os.close(lock)


def _end_marked(path: Path, patience_s: float = 10.0) -> None:
    """End the processes that a dead owner has left; they may hold its ports."""
    until = time.monotonic() + patience_s
    while (left := list(marked(path))) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(path: Path) -> Iterator[int]:
    """Yield the ids of the processes that were started for the server of a folder, as far as one may look at them."""
    # They inherit the path of the socket to which they log; those that write a title over what they inherit have files
    # of the folder open.
    variable, below = f"{SOCKET_VARIABLE}={path}/".encode(), f"{path}/"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                inherited = (entry / "environ").read_bytes().split(b"\0")
                files = (os.readlink(file) for file in os.scandir(entry / "fd"))
                if any(one.startswith(variable) for one in inherited) or any(
                    file.startswith(below) for file in files
                ):
                    yield int(entry.name)


def _remove(path: Path) -> None:
    for _ in range(50):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            break
        time.sleep(0.1)
