"""Waiting for what a test expects: for the event itself, with a bound that a machine busy with other work keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

# What takes milliseconds on idle cores. pytest's own timeout, in pyproject.toml, is longer than a few of these.
PATIENCE_S = 120.0
# For a call of a client whose deadline is not what the test is about: clients give up after a minute by themselves.
CALL_S = 300.0


def eventually(condition: Callable[[], Any], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"{what or condition}: not within {patience_s:.0f} s"
        time.sleep(0.02)


async def until(condition: Callable[[], Any], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition` holds, while the event loop goes on."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"{what or condition}: not within {patience_s:.0f} s"
        await asyncio.sleep(0.005)
