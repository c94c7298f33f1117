"""What the two clients share about uploads: the order of items, and what goes wrong while they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from monofacet import _exceptions as exceptions
from monofacet import _requests as requests
from monofacet import _responses as responses
from monofacet._inputs import Input
from monofacet._types import StreamResult
from monofacet.v1 import feature_service_pb2


class Ledger:
    """The items that were taken from the caller and not answered yet.

    An item that cannot be read here is not sent, yet its result must come in its place: the ledger keeps the
    order. The request side appends and the response side pops, possibly in two threads; a deque allows that.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[str, exceptions.InputError | None]] = deque()
        self._taken = 0

    def take(self, value: Input | tuple[str, Input]) -> feature_service_pb2.StreamEncodeRequest | None:
        """Enter an item.

        Parameters
        ----------
        value
            An input, or a pair of id and input.

        Returns
        -------
        StreamEncodeRequest or None
            What to send; None if the item cannot be read.
        """
        name, item = requests.stream_item(self._taken, value)
        self._taken += 1
        try:
            message = requests.stream_encode(name, item)
        except exceptions.InputError as error:
            self._pending.append((name, error))
            return None
        # Before it is sent: the answer may come from another thread at once.
        self._pending.append((name, None))
        return message

    def unreadable(self) -> Iterator[StreamResult]:
        """Settle the items that are next in order and were not sent.

        Yields
        ------
        StreamResult
            With the reason.
        """
        while self._pending:
            name, error = self._pending[0]
            if error is None:
                return
            self._pending.popleft()
            yield responses.bad_item(name, error)

    def answer(self, response: feature_service_pb2.StreamEncodeResponse) -> Iterator[StreamResult]:
        """Settle an answered item, and the unreadable ones around it.

        Parameters
        ----------
        response
            The next answer of the stream.

        Yields
        ------
        StreamResult
            In the order of the items.

        Raises
        ------
        ResponseError
            If it is not the answer to the next item.
        """
        yield from self.unreadable()
        name = self._pending.popleft()[0] if self._pending else None
        if name != response.id:
            raise exceptions.ResponseError(f"the server answered item {response.id!r} when {name!r} was next")
        yield responses.stream_encode(response)
        yield from self.unreadable()

    def close(self) -> Iterator[StreamResult]:
        """Settle what is left when the stream ended well.

        Yields
        ------
        StreamResult
            Of the unreadable items at the end.

        Raises
        ------
        ResponseError
            If an item was sent and not answered.
        """
        yield from self.unreadable()
        if self._pending:
            raise exceptions.ResponseError(
                f"the server ended the stream without answering item {self._pending[0][0]!r}"
            )
