"""How much work is before a new request, and whether it should be let in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deployments.batching import QueueFull

# How much of the former estimate stays with each new batch: the last twenty or so count.
_KEEP = 0.95
# A request may wait for as much work of others as so many times its own: four equal bulk callers share a server.
_PATIENCE = 3


class Backlog:
    """Admits requests to one deployment by the wait that they would have.

    The batcher shares the model evenly between callers, so what stands before a request of n items is, of each
    caller before it, at most n items. Large requests therefore weigh little on small ones, and a stream weighs as
    one caller however many of its items are under way.

    Parameters
    ----------
    max_items
        Items at the deployment, waiting or running; bounds memory. Streams, which can wait, take up to half.
    max_wait_s
        Expected seconds of waiting, by the speed of the last batches.
    batch_items
        Items of one forward: as much may always be before a request, since it takes one forward at most.

    Attributes
    ----------
    replicas
        Of the deployment that answer; they work side by side.
    items
        At the deployment now.
    """

    def __init__(self, max_items: int, max_wait_s: float, batch_items: int) -> None:
        self._max_items = max_items
        self._max_wait_s = max_wait_s
        self._batch_items = batch_items
        self.replicas = 1
        self._callers: dict[object, int] = {}
        self._weight = self._weighted_s = 0.0
        self.items = 0

    def observe(self, items: int, seconds: float) -> None:
        """Learn the speed from one forward.

        Full batches count most, by the square of their items: under load they are what will run, and a batch
        of one says little about them.
        """
        weight = float(items * items)
        self._weight = _KEEP * self._weight + weight
        self._weighted_s = _KEEP * self._weighted_s + weight * seconds / items

    @property
    def items_per_s(self) -> float:
        """Expected throughput of all replicas; 0 while nothing was observed."""
        return self.replicas * self._weight / self._weighted_s if self._weighted_s else 0.0

    def before(self, items: int) -> int:
        """Return how many items of others come before the last of `items` new ones."""
        return sum(min(items, theirs) for theirs in self._callers.values())

    @contextmanager
    def admitted(self, items: int, stream: object = None) -> Iterator[None]:
        """Hold a request's place from its arrival to its answer.

        Parameters
        ----------
        items
            Of the request.
        stream
            Names the stream that the items belong to; None for a request of its own.

        Raises
        ------
        QueueFull
            When it should come back later.
        """
        if self._callers and not self._fits(items, stream is not None):
            raise QueueFull
        caller = object() if stream is None else stream
        self._callers[caller] = self._callers.get(caller, 0) + items
        self.items += items
        try:
            yield
        finally:
            self.items -= items
            self._callers[caller] -= items
            if not self._callers[caller]:
                del self._callers[caller]

    def _fits(self, items: int, stream: bool) -> bool:
        if stream:
            return self.items + items <= max(1, self._max_items // 2)
        if self.items + items > self._max_items:
            return False
        wait = self._max_wait_s * self.items_per_s
        return self.before(items) < max(self._batch_items * self.replicas, wait, _PATIENCE * items + 1)
