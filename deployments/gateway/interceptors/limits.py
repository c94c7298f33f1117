"""The layer that refuses calls while the server is full, starting or stopping."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.errors import STARTING, Draining, Starting, TooManyCalls
from deployments.gateway.interceptors.chain import Call
from deployments.gateway.interceptors.reading import share


class Admission:
    """Counts the calls in progress; shuts the door until the models are warm, and when the server drains.

    Parameters
    ----------
    max_calls
        Calls in progress at once. Half of them is the most for one caller: a token, or an address without one.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self.closed = False
        # Whether the models are there; `GatewayServer` says so.
        self.open = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls(self) -> int:
        """Calls in progress."""
        return self._calls.total()

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        """Admit one call, or refuse it."""
        if self.closed:
            raise Draining
        if not self.open:
            raise Starting(STARTING)
        caller, in_progress = call.caller, self._calls.total()
        if in_progress >= self._max_calls:
            raise TooManyCalls(f"{in_progress} calls are in progress; try later")
        if self._calls[caller] >= share(self._max_calls):
            raise TooManyCalls(f"{self._calls[caller]} calls of this caller are in progress; try later")
        self._calls[caller] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls[caller] -= 1
            if not self._calls[caller]:
                del self._calls[caller]
            if not self._calls:
                self._idle.set()

    def close(self) -> None:
        """Refuse every new call from here on."""
        self.closed = True

    async def idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()
