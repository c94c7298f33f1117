"""How far a build is: a bar a stage with the time left, or a line now and then where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds between two lines where there is no terminal.
EVERY_S = 10.0


class Stage:
    """One stage under way.

    Parameters
    ----------
    reporter : Reporter
        Shows it.
    title : str
        For people.
    total : float
        Units of work.
    """

    def __init__(self, reporter: Reporter, title: str, total: float) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._done, self._started, self._said = 0.0, time.monotonic(), time.monotonic()
        self._bar = reporter.progress.add_task(title, total=total)

    def advance(self, amount: float = 1.0) -> None:
        """Tell that `amount` more units are done."""
        self._done += amount
        self._reporter.progress.update(self._bar, completed=self._done)
        now = time.monotonic()
        if not self._reporter.console.is_terminal and now - self._said >= EVERY_S:
            self._said = now
            left = (self._total - self._done) * (now - self._started) / max(self._done, 1e-9)
            self._reporter.say(
                f"{self._title}: {self._done:.0f} of {self._total:.0f}, about {clock(left)} left"
            )

    def end(self) -> None:
        """Tell that the stage is over."""
        self._reporter.progress.update(self._bar, completed=self._total)
        self._reporter.times[self._title] = time.monotonic() - self._started
        if not self._reporter.console.is_terminal:
            self._reporter.say(f"{self._title}: done in {clock(time.monotonic() - self._started)}")


class Reporter:
    """Shows stages on a console.

    Parameters
    ----------
    console : Console
        Where to.

    Attributes
    ----------
    times : dict of str to float
        Seconds of the stages that ran to their end.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.times: dict[str, float] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Reporter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False)

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[Stage]:
        """Show a stage of `total` units of work while the body runs."""
        stage = Stage(self, title, total)
        yield stage
        stage.end()


def clock(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
