"""How a long computation is told to end: it calls its `check` between steps, and what that raises ends it."""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[[], None]


def nothing() -> None:
    """Never end the computation."""
