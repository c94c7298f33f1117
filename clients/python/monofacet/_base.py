"""What the two clients share: settings, retries, and how a batch is split."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from monofacet import _exceptions as exceptions
from monofacet._config import TLS, Connection, Retry, Timeout
from monofacet._inputs import MAX_INPUTS, MAX_REQUEST_BYTES, split
from monofacet._status import error_from_rpc
from monofacet._types import Limits
from monofacet.v1 import (
    bias_service_pb2_grpc,
    common_pb2,
    defense_service_pb2_grpc,
    feature_service_pb2_grpc,
    imaging_service_pb2_grpc,
    modality_service_pb2_grpc,
    model_service_pb2_grpc,
)

logger = logging.getLogger("monofacet")

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

# Made all at once with the channel: gRPC crashes the process where a stub is made on a channel that was closed.
STUBS = (
    feature_service_pb2_grpc.FeatureServiceStub,
    modality_service_pb2_grpc.ModalityServiceStub,
    bias_service_pb2_grpc.BiasServiceStub,
    defense_service_pb2_grpc.DefenseServiceStub,
    imaging_service_pb2_grpc.ImagingServiceStub,
    model_service_pb2_grpc.ModelServiceStub,
    health_pb2_grpc.HealthStub,
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


class Tries:
    """Decides about another try of a call.

    Parameters
    ----------
    retry
        Waits and jitter.
    deadline
        No wait goes past it: the caller gets the real error, not a late DEADLINE_EXCEEDED.
    """

    def __init__(self, retry: Retry, deadline: Deadline) -> None:
        self._retry = retry
        self._deadline = deadline
        self._failures = self._silent = 0

    def wait(self, error: exceptions.CallError) -> float | None:
        """Say how long to wait after a failed try.

        Parameters
        ----------
        error
            Of the try.

        Returns
        -------
        float or None
            Seconds before the next try; None to give up.
        """
        retry, asked = self._retry, error.retry_after
        if not isinstance(error, exceptions.UnavailableError | exceptions.OverloadedError):
            return None
        if asked is None and isinstance(error, exceptions.OverloadedError):
            return None
        grown = 2.0 ** min(self._failures, 60)
        self._failures += 1
        self._silent += asked is None
        if retry.attempts == 1 or self._silent >= retry.attempts:
            return None
        least = max(asked or 0.0, min(retry.wait_initial * grown, retry.wait_max))
        left = self._deadline.left()
        if least >= left:
            return None
        spread = random.uniform(0, min(retry.wait_jitter * grown, retry.wait_max))
        # The last wait leaves time for a try.
        wait = min(least + spread, max(least, left / 2))
        logger.debug("trying again in %.2f s after failure %d: %s", wait, self._failures, error)
        return wait


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
        bundle: str,
        max_in_flight: int,
        channel: Any,
    ) -> None:
        if max_in_flight < 1:
            raise exceptions.InputError(f"max_in_flight is at least 1, not {max_in_flight}")
        self._connection = Connection(target, token, tls)
        self._bundle = bundle
        self._max_in_flight = max_in_flight
        # False for a client that `with_bundle` made: it uses the connection of another one.
        self._is_owner = True
        if timeout is None:
            timeout = Timeout()
        self._timeout = timeout if isinstance(timeout, Timeout) else Timeout(call=timeout)
        self._retry = retry or Retry()
        self._metadata = self._connection.metadata()
        self._given_channel = channel
        self._limits: Limits | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A connection belongs to its process: the other one makes its own when it is first used.
        if self._given_channel is not None:
            raise exceptions.InputError(
                "a client that was given a channel cannot be sent to another process: make a client there"
            )
        settings = {
            "token": self._connection.token,
            "tls": self._connection.tls,
            "timeout": self._timeout,
            "retry": self._retry,
            "bundle": self._bundle,
            "max_in_flight": self._max_in_flight,
        }
        return _rebuild, (type(self), self.target, settings)

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
        # Not `copy`, which makes what pickling makes: a client with a connection of its own.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _bundle=bundle, _is_owner=False)
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

    def _failure(self, error: grpc.RpcError, closed: bool) -> exceptions.MonofacetError:
        """Make the exception for what gRPC raised, `closed` telling whether the client is."""
        failure = error_from_rpc(error)
        was_cut = closed and isinstance(failure, exceptions.CallCancelledError)
        return exceptions.ClosedError("the client was closed while the call ran") if was_cut else failure

    def _no_place(self, deadline: Deadline) -> NoReturn:
        raise exceptions.DeadlineError(
            f"{self._max_in_flight} calls of this client were in flight (max_in_flight), and none ended within the "
            f"{deadline.seconds:g} s of this one",
            code="DEADLINE_EXCEEDED",
        )


def _rebuild(kind: type[Any], target: str, settings: dict[str, Any]) -> Any:
    return kind(target, **settings)


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
