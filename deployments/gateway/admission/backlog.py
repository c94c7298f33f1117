"""How much work is before a new request, and whether it should be let in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.batching import QueueFull

# A request may wait for as much work of others as so many times its own: four equal bulk callers share a server, and
# while it is overloaded three, so that an answer takes three times as long as on an idle server and no longer.
_PATIENCE = 3
_OVERLOADED_PATIENCE = 2
# Busy seconds that the measured speed remembers, and seconds that the count of refusals does.
_SPEED_S = 1.0
_REFUSALS_S = 1.0
# From this share of requests refused on, the server is overloaded: more callers than now and then one too many.
_OVERLOADED = 0.2
# The part of the room that a caller finds although others have filled it.
_FEW = 8
# Items that an overloaded replica still takes, however slow it is: one is computed, one is decoded, one is on its way.
_LEAST = 3


class _Fading:
    """A sum of which old summands fade away.

    Parameters
    ----------
    seconds
        In which a summand fades to 1/e.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.value = 0.0

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        self.value *= math.exp(-seconds / self._seconds)


class Backlog:
    """Admits requests to one deployment by the wait that they would have.

    The batcher shares the model evenly between callers, and each caller's part between the caller's requests. So what
    stands before a request of n items is, of each of the caller's own requests, at most n items, and of each other
    caller as much as of this one. Large requests therefore weigh little on small ones, a stream weighs as one request
    however many of its items are under way, and a caller as one however many requests there are. The wait is that many
    items over the speed at which items were answered while there was work: of the whole path, whatever part of it is
    the slow one.

    A burst may wait for `max_wait_s`, since the queue is empty again soon. While requests are refused all the time, no
    queue is a burst: a longer one delays every answer and adds none, so it is held at `overload_wait_s`.

    Source: Nichols and Jacobson, "Controlling queue delay" (2012), for telling a standing queue from a burst; Little's
    law, for the length that a wait stands for.

    Parameters
    ----------
    max_items
        Items at the deployment, waiting or running; bounds memory. Streams, which can wait, take up to half. Who has
        less than an eighth of that there may pass it, by an eighth each and twice it in all: others who fill the room
        keep nobody out.
    max_wait_s
        Expected seconds of waiting.
    overload_wait_s
        The same while a good part of all requests has to be refused.
    batch_items
        Items of one forward: as much may be before a request of a burst, since it takes one forward at most.
    clock
        Seconds, rising.

    Attributes
    ----------
    replicas
        Of the deployment that answer; they work side by side.
    items
        At the deployment now.
    """

    def __init__(
        self,
        max_items: int,
        max_wait_s: float,
        overload_wait_s: float,
        batch_items: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_items = max_items
        self._max_wait_s = max_wait_s
        self._overload_wait_s = overload_wait_s
        self._batch_items = batch_items
        self._clock = clock
        self._now = clock()
        self._answered, self._busy_s = _Fading(_SPEED_S), _Fading(_SPEED_S)
        self._asked, self._refused = _Fading(_REFUSALS_S), _Fading(_REFUSALS_S)
        self.replicas = 1
        # Items there, by caller and request.
        self._requests: dict[str, dict[object, int]] = {}
        self.items = 0

    @property
    def items_per_s(self) -> float:
        """Items answered a second while there was work; 0 while none was."""
        return self._answered.value / self._busy_s.value if self._busy_s.value else 0.0

    @property
    def overloaded(self) -> bool:
        """Whether a good part of the last requests had to be refused."""
        # Refusals fade also while no request comes.
        self._pass_time()
        return self._refused.value > max(1.0, _OVERLOADED * self._asked.value)

    def full(self, caller: str = "") -> bool:
        """Return whether a request of one item would be refused now; a larger one may wait for more."""
        return bool(self.items) and not self._fits(1, False, caller)

    def before(self, items: int, caller: str = "") -> int:
        """Return how many items come before the last of a caller's `items` new ones."""
        own = sum(min(items, theirs) for theirs in self._requests.get(caller, {}).values())
        others = (sum(theirs.values()) for name, theirs in self._requests.items() if name != caller)
        return own + sum(min(own + items, theirs) for theirs in others)

    def refuse(self) -> None:
        """Count a request that was refused, here or at the door."""
        self._pass_time()
        self._asked.value += 1
        self._refused.value += 1

    @contextmanager
    def admitted(self, items: int, stream: object = None, caller: str = "") -> Iterator[None]:
        """Hold a request's place from its arrival to its answer.

        Parameters
        ----------
        items
            Of the request.
        stream
            Names the stream that the items belong to; None for a request of its own.
        caller
            Whose it is.

        Raises
        ------
        QueueFull
            When it should come back later.
        """
        self._pass_time()
        if self.items and not self._fits(items, stream is not None, caller):
            # A stream that is made to wait asks again at once, which says nothing about the others.
            if stream is None:
                self.refuse()
            raise QueueFull
        self._asked.value += stream is None
        request = object() if stream is None else stream
        self._count(items, request, caller)
        try:
            yield
            self._pass_time()
            self._answered.value += items
        finally:
            self._pass_time()
            self._count(-items, request, caller)

    def _count(self, items: int, request: object, caller: str) -> None:
        self.items += items
        theirs = self._requests.setdefault(caller, {})
        theirs[request] = theirs.get(request, 0) + items
        if not theirs[request]:
            del theirs[request]
        if not theirs:
            del self._requests[caller]

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._now = max(0.0, now - self._now), now
        for counted in (self._asked, self._refused):
            counted.pass_(passed)
        if self.items:
            for measured in (self._answered, self._busy_s):
                measured.pass_(passed)
            self._busy_s.value += passed

    def _fits(self, items: int, stream: bool, caller: str) -> bool:
        own = sum(self._requests.get(caller, {}).values())
        few = own + items <= self._max_items // _FEW and self.items + items <= 2 * self._max_items
        if not few and self.items + items > self._max_items:
            return False
        if stream:
            half = max(1, self._max_items // 2)
            # A batch of pairs may be half by itself. Were it to wait for an empty queue, a steady load of others would
            # keep it out for ever; it waits until they leave as much as StreamEncode's chunks need.
            return few or self.items + min(items, max(1, half // 2)) <= half
        patience = _OVERLOADED_PATIENCE if self.overloaded else _PATIENCE
        return self.before(items, caller) < max(self._length(), patience * items + 1)

    def _length(self) -> float:
        """Return how many items may be before a request."""
        if self.overloaded:
            return max(_LEAST * self.replicas, self._overload_wait_s * self.items_per_s)
        return max(self._batch_items * self.replicas, self._max_wait_s * self.items_per_s)
