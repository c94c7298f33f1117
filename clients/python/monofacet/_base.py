"""What the two clients share: settings, retries, and how a batch is split."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet._config import TLS, Connection, Retry, Timeout
from monofacet._inputs import MAX_INPUTS, MAX_REQUEST_BYTES, split
from monofacet._types import Limits
from monofacet.v1 import common_pb2

Request = TypeVar("Request", bound=Message)

# A batch under both needs no question about the server's limits: any sensible server takes it.
SMALL_INPUTS = 32
SMALL_BYTES = 1024 * 1024

# The services whose health is asked for, and the empty name for the server as a whole.
SERVICES = (
    "",
    "monofacet.v1.FeatureService",
    "monofacet.v1.ModalityService",
    "monofacet.v1.BiasService",
    "monofacet.v1.DefenseService",
    "monofacet.v1.ImagingService",
    "monofacet.v1.ModelService",
)


class Deadline:
    """A budget of time over all tries of a call.

    Parameters
    ----------
    seconds
        From now.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 < seconds < float("inf"):
            raise exceptions.InputError(f"a timeout is a positive, finite number of seconds, not {seconds}")
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Say how much is left.

        Returns
        -------
        float
            Seconds, at least a millisecond: gRPC takes 0 for an error of the caller.
        """
        return max(self._end - time.monotonic(), 0.001)


class Batcher(Protocol):
    """Gathers the items of an upload into messages."""

    def add(self, item: Any, /) -> Sequence[Message]:
        """Take an item; return the messages that are full."""
        ...

    def rest(self) -> Sequence[Message]:
        """Return what was gathered since."""
        ...


def backoff(retry: Retry, deadline: Deadline) -> Callable[[Exception], bool | float]:
    """Decide about another try.

    Parameters
    ----------
    retry
        Waits and jitter.
    deadline
        No wait goes past it: the caller gets the real error, not a late DEADLINE_EXCEEDED.

    Returns
    -------
    callable
        For `stamina.retry_context`: False to give up, or the seconds to wait.
    """
    failures = counted = 0

    def decide(error: Exception) -> bool | float:
        nonlocal failures, counted
        if not isinstance(error, exceptions.UnavailableError | exceptions.OverloadedError):
            return False
        asked = error.retry_after
        unavailable = isinstance(error, exceptions.UnavailableError)
        failures += 1
        # A server that is about to be back is waited for; see `Retry`.
        counted += not (unavailable and asked is not None)
        if retry.attempts == 1 or counted >= retry.attempts or (asked is None and not unavailable):
            return False
        # Never earlier than asked, and less and less often.
        grown = min(retry.wait_initial * 2.0 ** min(failures - 1, 60), retry.wait_max)
        wait = max(asked or 0.0, grown) + random.uniform(0, retry.wait_jitter)
        return wait if wait < deadline.left() else False

    return decide


class BaseClient:
    """Settings of a client; see `Client` for the parameters."""

    def __init__(
        self,
        target: str,
        *,
        token: str | None,
        tls: TLS | bool | None,
        timeout: Timeout | float | None,
        retry: Retry | None,
        channel: Any,
        bundle: str,
    ) -> None:
        self._connection = Connection(target, token, tls)
        self._bundle = bundle
        # Of a client that `with_bundle` made: the one whose connection it uses.
        self._owner: Self | None = None
        if timeout is None:
            timeout = Timeout()
        self._timeout = timeout if isinstance(timeout, Timeout) else Timeout(call=timeout)
        self._retry = retry or Retry()
        self._metadata = self._connection.metadata()
        self._given_channel = channel
        self._limits: Limits | None = None

    @property
    def target(self) -> str:
        """Where the server is, as ``host:port``."""
        return self._connection.target

    @property
    def bundle(self) -> str:
        """The bundle that answers this client's calls, as it was named; empty for the server's default."""
        return self._bundle

    def with_bundle(self, bundle: str) -> Self:
        """Return a client of the same connection whose calls another bundle answers.

        Parameters
        ----------
        bundle
            Name or id (``name@hash``) of one of the bundles that the server serves: `models` lists them. Empty for
            the server's default.

        Returns
        -------
        Client or AsyncClient
            As this one. It lives as long as this one's connection, and closing it does nothing.

        Examples
        --------
        >>> photos = client.with_bundle("photos")  # doctest: +SKIP
        >>> photos.encode(["a red heart"]).bundle
        'photos@0123456789ab'
        """
        other = copy.copy(self)
        other._bundle = bundle
        other._owner = self._owner or self
        return other

    def _addressed(self, request: Request) -> Request:
        """Name this client's bundle in a request that names none, and return it."""
        fields = request.DESCRIPTOR.fields_by_name
        if self._bundle and "bundle" in fields and not getattr(request, "bundle"):  # noqa: B009  # not of every message
            setattr(request, "bundle", self._bundle)  # noqa: B010
        return request

    def __repr__(self) -> str:
        # The token stays out: representations end up in logs.
        named = f" {self._bundle}" if self._bundle else ""
        return f"<{type(self).__name__} {self.target}{named}>"

    def _retrying(self, deadline: Deadline) -> dict[str, Any]:
        return {
            "on": backoff(self._retry, deadline),
            # `backoff` counts.
            "attempts": None,
            "timeout": deadline.seconds,
        }


def is_small(inputs: Sequence[common_pb2.Input], reserved: int = 0, reserved_bytes: int = 0) -> bool:
    """Tell whether a batch fits any server.

    Parameters
    ----------
    inputs
        The whole batch.
    reserved
        Texts that every part brings besides.
    reserved_bytes
        Bytes of the request without its inputs, which every part brings too.

    Returns
    -------
    bool
        True if it can be sent without knowing the server's limits.
    """
    size = reserved_bytes + sum(item.ByteSize() for item in inputs)
    return len(inputs) + reserved <= SMALL_INPUTS and size <= SMALL_BYTES


def split_within(
    inputs: Sequence[common_pb2.Input], limits: Limits | None, reserved: int = 0, reserved_bytes: int = 0
) -> list[Sequence[common_pb2.Input]]:
    """Split a batch within the server's limits.

    Parameters
    ----------
    inputs
        The whole batch.
    limits
        Of the server, or None for the contract's ceilings.
    reserved
        Texts that every part brings besides.
    reserved_bytes
        Bytes of the request without its inputs, which every part brings too.

    Returns
    -------
    list of sequences
        Parts, in order.
    """
    if limits is None:
        return split(inputs, MAX_INPUTS - reserved, MAX_REQUEST_BYTES - reserved_bytes)
    # 0 is a field that the server did not set.
    return split(
        inputs,
        # A server that takes no image beside so many texts says so itself.
        max(1, min(limits.max_inputs or MAX_INPUTS, MAX_INPUTS) - reserved),
        min(limits.max_request_bytes or MAX_REQUEST_BYTES, MAX_REQUEST_BYTES) - reserved_bytes,
    )
