"""The guards of client streams: calls of which something of every message is kept until they are answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from deployments.gateway.errors import StreamIdle, TooManyCalls
from deployments.gateway.interceptors.chain import current_caller
from deployments.gateway.interceptors.reading import share

Message = TypeVar("Message")


class ClientStreams:
    """Bounds how many client streams there are, of all methods and bundles together, and how long they may be idle.

    Flow control bounds what is on its way and not what is kept; and one who opens streams and sends nothing would
    take the places of all others.

    Parameters
    ----------
    max_streams
        At once, half of them of one caller at most.
    idle_s
        Seconds that one may send nothing.
    """

    def __init__(self, max_streams: int, idle_s: float) -> None:
        self._max_streams = max_streams
        self._idle_s = idle_s
        self._streams: Counter[str] = Counter()

    @property
    def streams(self) -> int:
        """Streams in progress."""
        return self._streams.total()

    @contextmanager
    def admitted(self, messages: AsyncIterator[Message]) -> Iterator[AsyncIterator[Message]]:
        """Hold a stream's place from its first message, which says where it belongs, until it is answered.

        Parameters
        ----------
        messages
            Of the caller.

        Returns
        -------
        The same messages, which end with StreamIdle when the next one does not come in time.

        Raises
        ------
        TooManyCalls
            When there are as many streams as allowed, in all or of this caller.
        """
        caller, in_progress = current_caller.get(), self.streams
        if in_progress >= self._max_streams:
            raise TooManyCalls(f"{in_progress} client streams are in progress; try later")
        if self._streams[caller] >= share(self._max_streams):
            raise TooManyCalls(
                f"{self._streams[caller]} client streams of this caller are in progress; try later"
            )
        self._streams[caller] += 1
        try:
            yield lively(messages, self._idle_s)
        finally:
            self._streams[caller] -= 1


async def lively(messages: AsyncIterator[Message], idle_s: float) -> AsyncIterator[Message]:
    """Yield the messages of a stream; raise StreamIdle when the next one does not come within `idle_s` seconds."""
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise StreamIdle(f"the stream sent nothing for {idle_s:g} s; begin again") from None
        yield message
