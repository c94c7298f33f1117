"""The layer that refuses calls while the server is full or stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.errors import Draining, TooManyCalls
from deployments.gateway.interceptors.chain import Call


class Admission:
    """Counts the calls in progress and closes the door when the server drains.

    Parameters
    ----------
    max_calls
        Calls in progress at once.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def layer(self, _: Call) -> AsyncIterator[None]:
        """Admit one call, or refuse it."""
        if self._closed:
            raise Draining
        if self._calls >= self._max_calls:
            raise TooManyCalls(f"{self._calls} calls are in progress; try later")
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def close(self) -> None:
        """Refuse every new call from here on."""
        self._closed = True

    async def idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()
