"""A stream's items on their way through the gateway: read one by one, encoded in chunks, answered in order.

An item by itself would cost a task, a place in the queue and its share of a message, most of it for nothing: what has
arrived while the chunks before were encoded is the next chunk. A slow caller's items travel alone, at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.errors import InvalidInput

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One item of a stream.

    Attributes
    ----------
    id
        The caller's name for it.
    size
        Bytes of its message.
    value
        Encoded image file or text; an InvalidInput where it breaks the contract's rules.
    """

    id: str
    size: int
    value: bytes | str | InvalidInput


class Window:
    """Bounds the items of a stream that are in progress, in number and in bytes.

    Parameters
    ----------
    max_items
        In progress at once.
    max_bytes
        Of their messages together; an item that is larger by itself is alone.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items = self._bytes = 0
        self._left = asyncio.Event()

    async def room(self, size: int) -> None:
        """Wait until an item of `size` bytes fits; one reader only."""
        while self._items >= self._max_items or (self._items and self._bytes + size > self._max_bytes):
            self._left.clear()
            await self._left.wait()

    def enter(self, size: int) -> None:
        """Let an item in."""
        self._items += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """Let an item out, once it is answered."""
        self._items -= 1
        self._bytes -= size
        self._left.set()


class Chunks(Generic[Answer]):
    """Encodes the items of one stream in chunks, some at once, and gives the answers in order.

    Parameters
    ----------
    encode
        Answers the items of one chunk, in order.
    max_items
        Of one chunk.
    at_once
        Chunks in progress: one is computed while the next is on its way.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[StreamItem]], Awaitable[list[Answer]]],
        max_items: int,
        at_once: int,
    ) -> None:
        self._encode = encode
        self._max_items = max_items
        self._at_once = at_once
        self._waiting: deque[StreamItem] = deque()
        self._running: set[asyncio.Task[list[Answer]]] = set()
        self._begun: asyncio.Queue[tuple[list[StreamItem], asyncio.Task[list[Answer]]] | None] = (
            asyncio.Queue()
        )
        self._wakeup: asyncio.Handle | None = None
        self._ended = False

    def add(self, item: StreamItem) -> None:
        """Take an item."""
        self._waiting.append(item)
        # One turn of the event loop later, so that items which arrived together share a chunk.
        if self._wakeup is None and len(self._running) < self._at_once:
            self._wakeup = asyncio.get_running_loop().call_soon(self._begin)

    def end(self) -> None:
        """Say that no more items come."""
        self._ended = True
        self._begin()

    def cancel(self) -> None:
        """Abandon what is in progress."""
        self._waiting.clear()
        for task in self._running:
            task.cancel()

    async def answers(self) -> AsyncIterator[tuple[StreamItem, Answer]]:
        """Yield every item with its answer, until the last."""
        while (chunk := await self._begun.get()) is not None:
            items, task = chunk
            for pair in zip(items, await task, strict=True):
                yield pair

    def _begin(self) -> None:
        self._wakeup = None
        while self._waiting and len(self._running) < self._at_once:
            items = [self._waiting.popleft() for _ in range(min(self._max_items, len(self._waiting)))]
            task = asyncio.ensure_future(self._encode(items))
            self._running.add(task)
            task.add_done_callback(self._finished)
            self._begun.put_nowait((items, task))
        if self._ended and not self._waiting:
            self._begun.put_nowait(None)

    def _finished(self, task: asyncio.Task[list[Answer]]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Looked at here, too: asyncio would log the error of a chunk whose stream an earlier one has ended.
            task.exception()
        self._begin()
