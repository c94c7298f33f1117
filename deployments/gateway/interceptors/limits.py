"""The layer that refuses calls while the server is full, starting or stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.errors import STARTING, Draining, Starting, TooManyCalls
from deployments.gateway.interceptors.chain import Call


class Admission:
    """Counts the calls in progress; shuts the door until the models are warm, and when the server drains.

    Parameters
    ----------
    max_calls
        Calls in progress at once.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls = 0
        self.closed = False
        # Whether the models are there; `GatewayServer` says so.
        self.open = False
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """Raise what refuses a call that begins now."""
        if self.closed:
            raise Draining
        if not self.open:
            raise Starting(STARTING)
        if self._calls >= self._max_calls:
            raise TooManyCalls(f"{self._calls} calls are in progress; try later")

    @asynccontextmanager
    async def layer(self, _: Call) -> AsyncIterator[None]:
        """Admit one call, or refuse it."""
        self.check()
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
        self.closed = True

    async def idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()
