"""The layer that reads requests: what a caller makes the gateway hold is counted before it is held.

gRPC reads a message whole, says its size only then, and reads none before it is asked to: of a call that nobody
reads it holds one flow-control window. So the asking is what is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from deployments.gateway.errors import (
    Draining,
    MalformedRequest,
    RequestSlow,
    RequestTooLarge,
    StreamIdle,
    TooManyCalls,
)
from deployments.gateway.interceptors.chain import Call

# Seconds that the callers of a server that is stopping may take for the rest of a request.
_DRAIN_S = 3.0


@dataclass(slots=True)
class Received:
    """A message as it came: its size on the wire, and what it says or why it says nothing."""

    size: int
    message: Any
    error: Exception | None = None

    def taken(self) -> Any:
        """Return the message, once, or raise what is wrong with it.

        gRPC's iterator keeps the last of what it gave, and an aborted call keeps the iterator.
        """
        error, message = self.error, self.message
        self.error = self.message = None
        if error is not None:
            raise error
        return message


def checked_deserializer(decode: Callable[[bytes], Any], max_bytes: int) -> Callable[[bytes], Received]:
    """Return `decode` with the size checked on the wire bytes, before a message is made of them."""

    def deserialize(data: bytes) -> Received:
        size = len(data)
        if size > max_bytes:
            return Received(
                size, None, RequestTooLarge(f"the request has {size} bytes; {max_bytes} are allowed")
            )
        try:
            return Received(size, decode(data))
        except Exception:  # protobuf raises DecodeError or ValueError by implementation
            return Received(size, None, MalformedRequest("the request cannot be decoded"))

    return deserialize


def share(places: int) -> int:
    """Return how many of `places` one caller may have, so that there are some for another."""
    return max(1, places // 2)


@dataclass(slots=True, eq=False)
class _Reading:
    """A message that is being read."""

    caller: str
    began: float
    timeout: asyncio.Timeout
    # Why it is given up before its time.
    why: Exception | None = None

    def give_up(self, why: Exception, when: float) -> None:
        # One whose time is up may still wait for its turn to hear of it.
        if not self.timeout.expired():
            self.why = why
            self.timeout.reschedule(when)


@dataclass(slots=True, eq=False)
class _Stream:
    caller: str
    reading: _Reading | None = None


@dataclass(slots=True)
class _Waiting:
    caller: str
    granted: asyncio.Future[None]


class Requests:
    """Reads the requests of all calls.

    The request of a unary call counts as the largest possible while it is read, and as what it is until its call is
    answered. Half of the room is the most for one caller. Who finds none waits, and then a request that has been read
    for longer than `patience_s` is given up: the oldest of the caller who holds most.

    Client streams have places, since one that sends nothing could hold as much as one that sends half a message.

    Parameters
    ----------
    max_bytes
        Held at once, of unary requests.
    largest_bytes
        Of one message.
    read_s
        Seconds in which a unary request must have come.
    patience_s
        Seconds that it is left when others wait for its room.
    max_streams
        Client streams at once.
    idle_s
        Seconds that a client stream may send nothing.
    idle_patience_s
        The same when another caller waits for its place.
    """

    def __init__(
        self,
        max_bytes: int,
        largest_bytes: int,
        read_s: float,
        patience_s: float,
        max_streams: int,
        idle_s: float,
        idle_patience_s: float,
    ) -> None:
        # Two callers must be able to read at once, or one could keep out the other.
        self._max_bytes = max(max_bytes, 2 * largest_bytes)
        self._largest_bytes = largest_bytes
        self._read_s = read_s
        self._patience_s = patience_s
        self._max_streams = max_streams
        self._idle_s = idle_s
        self._idle_patience_s = idle_patience_s
        self._held: Counter[str] = Counter()
        self._total = 0
        self._waiting: list[_Waiting] = []
        self._readings: set[_Reading] = set()
        self._streams: set[_Stream] = set()
        self._look_again: asyncio.TimerHandle | None = None
        self._draining = False

    @property
    def bytes(self) -> int:
        """Held now, those that are being read counted as the largest possible."""
        return self._total

    @property
    def streams(self) -> int:
        """Client streams in progress."""
        return len(self._streams)

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        """Read the request of a unary call, or hold the place of a client stream.

        Raises
        ------
        RequestTooLarge, MalformedRequest
            As the message is.
        RequestSlow
            When it does not come in time.
        TooManyCalls
            When there are as many client streams as allowed.
        """
        if call.client_streaming:
            with self._place(call.caller) as stream:
                call.requests = self._messages(stream, call.requests)
                yield
            return
        caller = call.caller
        await self._reserve(caller)
        held = self._largest_bytes
        try:
            received = await self._read(caller, call.requests)
            self._release(caller, held - received.size)
            held = received.size
            call.request = received.taken()
            del received
            yield
        finally:
            self._release(caller, held)

    def drain(self) -> None:
        """Give up the requests of callers who do not send the rest of them soon."""
        self._draining = True
        when = asyncio.get_running_loop().time() + _DRAIN_S
        for reading in self._all_readings():
            reading.give_up(Draining(), when)

    def _all_readings(self) -> Iterator[_Reading]:
        yield from self._readings
        yield from (stream.reading for stream in self._streams if stream.reading is not None)

    async def _read(self, caller: str, requests: AsyncIterator[Any]) -> Received:
        reading: _Reading | None = None
        try:
            async with asyncio.timeout(_DRAIN_S if self._draining else self._read_s) as timeout:
                reading = _Reading(caller, time.monotonic(), timeout)
                self._readings.add(reading)
                received: Received = await anext(requests)
                return received
        except StopAsyncIteration:
            raise MalformedRequest("the call has no request") from None
        except TimeoutError:
            assert reading is not None
            why = Draining() if self._draining else _slow(self._read_s)
            raise reading.why or why from None
        finally:
            if reading is not None:
                self._readings.discard(reading)

    async def _reserve(self, caller: str) -> None:
        """Wait until there is room for the largest message."""
        if not self._waiting and self._fits(caller):
            self._hold(caller)
            return
        waiting = _Waiting(caller, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.granted.cancelled():
                self._release(caller, self._largest_bytes)
            raise

    def _fits(self, caller: str) -> bool:
        mine = self._held[caller] + self._largest_bytes
        return self._total + self._largest_bytes <= self._max_bytes and mine <= self._max_bytes // 2

    def _hold(self, caller: str) -> None:
        self._held[caller] += self._largest_bytes
        self._total += self._largest_bytes

    def _release(self, caller: str, size: int) -> None:
        self._total -= size
        self._held[caller] -= size
        if not self._held[caller]:
            del self._held[caller]
        if self._waiting:
            self._grant()

    def _grant(self) -> None:
        """Let those read for whom there is room, the caller who holds least first."""
        # A call that was cancelled may not have run since, and so still be listed.
        self._waiting = [waiting for waiting in self._waiting if not waiting.granted.cancelled()]
        while self._waiting:
            # `min` takes the first of equals, so that of one caller the oldest is next.
            first = min(
                (w for w in self._waiting if self._fits(w.caller)),
                key=lambda w: self._held[w.caller],
                default=None,
            )
            if first is None:
                self._make_room()
                return
            self._waiting.remove(first)
            self._hold(first.caller)
            first.granted.set_result(None)

    def _make_room(self) -> None:
        """Give up what has been read for too long while others wait; look again when the next one will have been."""
        if self._look_again is not None:
            return
        reading = self._oldest()
        if reading is None:
            return
        loop = asyncio.get_running_loop()
        left = reading.began + self._patience_s - time.monotonic()
        if left <= 0:
            reading.give_up(_slow(self._patience_s), loop.time())
            left = self._patience_s / 8
        self._look_again = loop.call_later(left, self._look)

    def _look(self) -> None:
        self._look_again = None
        if self._waiting:
            self._grant()

    def _oldest(self) -> _Reading | None:
        """Return the reading that would be given up first."""
        readings = [reading for reading in self._readings if reading.why is None]
        # Who waits for room of its own half does not take it from others.
        others = any(
            self._held[w.caller] + self._largest_bytes <= self._max_bytes // 2 for w in self._waiting
        )
        waiting = {w.caller for w in self._waiting}
        if others:
            most = max((self._held[reading.caller] for reading in readings), default=0)
            readings = [reading for reading in readings if self._held[reading.caller] == most]
        else:
            readings = [reading for reading in readings if reading.caller in waiting]
        return min(readings, key=lambda reading: reading.began, default=None)

    @contextmanager
    def _place(self, caller: str) -> Iterator[_Stream]:
        """Hold the place of a client stream."""
        mine = sum(stream.caller == caller for stream in self._streams)
        if mine >= share(self._max_streams):
            raise TooManyCalls(f"{mine} client streams of this caller are in progress; try later")
        if len(self._streams) >= self._max_streams and not self._leave_place():
            raise TooManyCalls(f"{len(self._streams)} client streams are in progress; try later")
        stream = _Stream(caller)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    def _leave_place(self) -> bool:
        """End the longest silent stream of the caller who has most, if it has been silent for long."""
        of = Counter(stream.caller for stream in self._streams)
        now = time.monotonic()
        silent = [
            (of[stream.caller], now - stream.reading.began, stream)
            for stream in self._streams
            if stream.reading is not None
            and stream.reading.why is None
            and now - stream.reading.began >= self._idle_patience_s
        ]
        if not silent:
            return False
        stream = max(silent, key=lambda one: one[:2])[2]
        if stream.reading is not None:
            stream.reading.give_up(_idle(self._idle_patience_s), asyncio.get_running_loop().time())
        # Its place is another's from now on.
        self._streams.discard(stream)
        return True

    async def _messages(self, stream: _Stream, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        while True:
            idle_s = _DRAIN_S if self._draining else self._idle_s
            try:
                async with asyncio.timeout(idle_s) as timeout:
                    stream.reading = _Reading(stream.caller, time.monotonic(), timeout)
                    received: Received = await anext(requests)
            except StopAsyncIteration:
                return
            except TimeoutError:
                why = stream.reading.why if stream.reading is not None else None
                raise why or (Draining() if self._draining else _idle(idle_s)) from None
            finally:
                stream.reading = None
            message = received.taken()
            del received
            yield message


def _slow(seconds: float) -> RequestSlow:
    return RequestSlow(f"the request did not come within {seconds:g} s; try later")


def _idle(seconds: float) -> StreamIdle:
    return StreamIdle(f"the stream sent nothing for {seconds:g} s; begin again")
