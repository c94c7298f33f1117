"""Channels of the asyncio client, one for each event loop that it is used in."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import grpc

from monofacet import _exceptions as exceptions
from monofacet._base import STUBS


class Link:
    """A channel with its stubs, and the places of the calls in flight, in one event loop.

    Parameters
    ----------
    channel
        To the server.
    places
        Calls that may be in flight.
    """

    def __init__(self, channel: grpc.aio.Channel, places: int) -> None:
        self.channel = channel
        # The stubs' types are those of a synchronous channel: that they are awaited is known here only.
        self.stubs: dict[type[Any], Any] = {kind: kind(channel) for kind in STUBS}  # type: ignore[abstract, call-arg, unused-ignore]
        self.places = asyncio.BoundedSemaphore(places)
        self.closed = asyncio.Event()

    async def close(self, owned: bool) -> None:
        """End the waits and, if the channel is the client's own, the calls."""
        self.closed.set()
        if owned:
            await self.channel.close()


class Links:
    """The links of a client, one for each event loop that it is used in: a channel serves no other loop than its own.

    Parameters
    ----------
    connect
        Makes a link to the server.
    owned
        Whether the channels are the client's own, and are closed with it.
    """

    def __init__(self, connect: Callable[[], Link], owned: bool) -> None:
        self.closed = False
        self._connect = connect
        self._owned = owned
        self._lock = threading.Lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = (
            weakref.WeakKeyDictionary()
        )

    def here(self) -> Link:
        """Return the link of the running loop, made when it is first asked for.

        Raises
        ------
        ClosedError
            If the client is closed.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.closed:
                raise exceptions.ClosedError
            if loop not in self._by_loop:
                # Those of loops that ended hold a connection each.
                for other in [other for other in self._by_loop if other.is_closed()]:
                    del self._by_loop[other]
                self._by_loop[loop] = self._connect()
            return self._by_loop[loop]

    async def close(self) -> None:
        """Close all links."""
        with self._lock:
            self.closed = True
            links = dict(self._by_loop)
            self._by_loop.clear()
        here = asyncio.get_running_loop()
        for loop, link in links.items():
            if loop is here:
                await link.close(self._owned)
            elif loop.is_running():
                # Of another thread. Waited for, so that its calls have ended when this returns.
                closing = asyncio.run_coroutine_threadsafe(link.close(self._owned), loop)
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wrap_future(closing)
