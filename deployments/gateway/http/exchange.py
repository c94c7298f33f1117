"""One call between what reads and writes HTTP and the chain, which says whether and when a message is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from deployments.gateway.http.calls import Calls, HttpContext
from deployments.gateway.interceptors.reading import Received

Receive = Any


class Exchange:
    """Runs a call's chain beside the reading of its request.

    A call that is refused for who makes it is refused unread, as over gRPC: `admitted` returns only once the chain
    asks for the first message.

    Parameters
    ----------
    calls
        Runs it.
    method
        `monofacet.v1.FeatureService/Encode`.
    context
        Of the call; its answers come from `answers`.
    """

    def __init__(self, calls: Calls, method: str, context: HttpContext) -> None:
        loop = asyncio.get_running_loop()
        self._asked: asyncio.Future[None] = loop.create_future()
        self._incoming: asyncio.Queue[Received | None] = asyncio.Queue(1)
        self._answers: asyncio.Queue[tuple[Any, asyncio.Future[None]] | None] = asyncio.Queue()
        self._reading: asyncio.Timeout | None = None
        self.context = context
        context.write = self._write
        self.task: asyncio.Task[Any] = loop.create_task(calls.run(method, self._requests(), context))
        self.task.add_done_callback(self._ended)

    async def admitted(self) -> None:
        """Wait until the chain asks for the request.

        Raises
        ------
        CallFailed
            When it refuses the call instead.
        """
        await self._asked
        if self.task.done():
            await self.task

    async def read(self, receive: Receive) -> Any:
        """Await one ASGI message of the request, as long as the chain wants the request.

        Raises
        ------
        CallFailed
            When the chain ends before.
        """
        if self.task.done():
            # Nobody reads the request any more, but a disconnection still comes this way.
            return await receive()
        try:
            async with asyncio.timeout(None) as self._reading:
                return await receive()
        except TimeoutError:
            await self.task
            raise
        finally:
            self._reading = None

    async def give(self, received: Received) -> None:
        """Hand over one message; returns at once where the call has ended."""
        await self._unless_ended(received)

    async def finish(self) -> None:
        """Say that there are no more messages."""
        await self._unless_ended(None)

    async def _unless_ended(self, received: Received | None) -> None:
        while not self.task.done():
            with suppress(asyncio.QueueFull):
                self._incoming.put_nowait(received)
                return
            putting = asyncio.ensure_future(self._incoming.put(received))
            await asyncio.wait({putting, self.task}, return_when=asyncio.FIRST_COMPLETED)
            if putting.done():
                return
            putting.cancel()

    async def answers(self) -> AsyncIterator[Any]:
        """Yield the answers of a stream; one counts as taken when the next is asked for.

        Raises
        ------
        CallFailed
            When the call ends with an error status.
        """
        while (answer := await self._answers.get()) is not None:
            message, taken = answer
            yield message
            if not taken.done():
                taken.set_result(None)
        await self.task

    async def cancel(self) -> None:
        """End the call, whose caller has gone."""
        self.task.cancel()
        await asyncio.wait({self.task})

    async def _requests(self) -> AsyncIterator[Received]:
        if not self._asked.done():
            self._asked.set_result(None)
        while (received := await self._incoming.get()) is not None:
            yield received

    async def _write(self, message: Any) -> None:
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers.put_nowait((message, taken))
        await taken

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            # Whoever awaits the call gets its error; where nobody does, asyncio would log that it was never read.
            task.exception()
        if not self._asked.done():
            self._asked.set_result(None)
        self._answers.put_nowait(None)
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())
