"""Files that are read again when they change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A look at a file's time stamps costs microseconds; once a second is soon enough for a rotation.
LOOK_S = 1.0


class Watched:
    """Files that belong together, such as a certificate and its key.

    Time stamps are followed through links, which is how a mounted Kubernetes Secret is swapped.

    Parameters
    ----------
    paths
        The files.
    look_s
        Seconds between two looks; `LOOK_S` by default.
    clock
        Monotonic seconds, for tests.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        look_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._look_s = LOOK_S if look_s is None else look_s
        self._clock = clock
        self._next_look = clock() + self._look_s
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Return whether any file differs from what `read` last saw; looks at most once in `look_s`."""
        now = self._clock()
        if now < self._next_look:
            return False
        self._next_look = now + self._look_s
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        # Once only: a broken file is reported once and tried again when it changes again.
        self._seen = stamps
        return True

    def read(self) -> list[bytes]:
        """Return the contents, in the order of the paths.

        Raises
        ------
        OSError
            When a file cannot be read.
        """
        self._seen = self._stamps()
        return [path.read_bytes() for path in self._paths]

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
