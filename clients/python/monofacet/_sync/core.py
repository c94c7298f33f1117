"""What all calls of the synchronous client go through."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._base import STUBS, BaseClient, Batcher, Deadline, Tries, is_small, split_within
from monofacet._config import MAX_IN_FLIGHT, TLS, Retry, Timeout
from monofacet._inputs import Input, to_inputs
from monofacet._status import shift_violations
from monofacet.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc

Response = TypeVar("Response")


class Link:
    """A channel with its stubs, and the places of the calls in flight.

    Parameters
    ----------
    channel
        To the server.
    places
        Calls that may be in flight.
    """

    def __init__(self, channel: grpc.Channel, places: int) -> None:
        self.channel = channel
        self.stubs = {kind: kind(channel) for kind in STUBS}  # type: ignore[abstract, call-arg, unused-ignore]
        self.places = threading.BoundedSemaphore(places)
        self.closed = threading.Event()


class SyncCore(BaseClient):
    """The channel, and a call with its deadline and retries."""

    def __init__(
        self,
        target: str = "localhost:9000",
        *,
        token: str | None = None,
        tls: TLS | bool | None = None,
        timeout: Timeout | float | None = None,
        retry: Retry | None = None,
        bundle: str = "",
        max_in_flight: int = MAX_IN_FLIGHT,
        channel: grpc.Channel | None = None,
    ) -> None:
        super().__init__(
            target,
            token=token,
            tls=tls,
            timeout=timeout,
            retry=retry,
            bundle=bundle,
            max_in_flight=max_in_flight,
            channel=channel,
        )
        self._link = Link(channel if channel is not None else self._open(), max_in_flight)

    def _open(self) -> grpc.Channel:
        credentials = self._connection.credentials()
        options = self._connection.options()
        if credentials is None:
            return grpc.insecure_channel(self.target, options=options)
        return grpc.secure_channel(self.target, credentials, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Calls in progress, and all later ones, raise a `ClosedError`."""
        if not self._is_owner:
            return
        self._link.closed.set()
        if self._given_channel is None:
            self._link.channel.close()

    def _stub(self, kind: type[Any]) -> Any:
        return self._link.stubs[kind]

    def _begin(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:
        """Make a call with one answer, or start one with several."""
        if self._link.closed.is_set():
            raise exceptions.ClosedError
        try:
            return method(request, timeout=deadline.left(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failed(error) from error
        except ValueError as error:
            # gRPC's own, for a channel that was closed in the meantime, or by whoever gave it.
            if "closed" not in str(error):
                raise
            raise exceptions.ClosedError from error

    def _failed(self, error: grpc.RpcError) -> exceptions.MonofacetError:
        return self._failure(error, self._link.closed.is_set())

    def _again(self, attempt: Callable[[], Response], deadline: Deadline) -> Response:
        """Try until there is an answer, or an error that another try would not mend."""
        tries = Tries(self._retry, deadline)
        while True:
            try:
                return attempt()
            except exceptions.CallError as error:
                wait = tries.wait(error)
                if wait is None:
                    raise
            self._link.closed.wait(wait)

    @contextlib.contextmanager
    def _place(self, deadline: Deadline) -> Iterator[None]:
        """Wait for a place among the calls in flight, and hold it."""
        if not self._link.places.acquire(timeout=deadline.left()):
            self._no_place(deadline)
        try:
            yield
        finally:
            self._link.places.release()

    def _call(self, method: Callable[..., Any], request: Any, timeout: float | None) -> Any:
        deadline = Deadline(self._timeout.call if timeout is None else timeout)
        self._addressed(request)
        with self._place(deadline):
            return self._again(lambda: self._begin(method, request, deadline), deadline)

    def _in_parts(
        self,
        inputs: Input | Iterable[Input],
        method: Callable[..., Any],
        request: Callable[[Sequence[common_pb2.Input]], Message],
        timeout: float | None,
        *,
        field: str = "inputs",
        reserved: int = 0,
    ) -> tuple[list[Any], list[int]]:
        """Send a batch as one request or several; return the answers, and how many inputs each is for."""
        # Labels, or the features of an ablation: every part repeats them.
        besides = self._addressed(request([])).ByteSize()
        batch = to_inputs(inputs)
        small = is_small(batch, reserved, besides)
        parts = [batch] if small else split_within(batch, self._server_limits(), reserved, besides)
        answers = []
        offset = 0
        for part in parts:
            try:
                answers.append(self._call(method, request(part), timeout))
            except exceptions.CallError as error:
                raise shift_violations(error, field, offset) from error.__cause__
            offset += len(part)
        return answers, [len(part) for part in parts]

    def _upload(
        self, method: Any, first: Message, batcher: Batcher, items: Iterable[Any], timeout: float | None
    ) -> Any:
        """Send a message and then the items, as gRPC asks for them; return the one answer."""
        deadline = Deadline(self._timeout.stream if timeout is None else timeout)

        def messages() -> Iterator[Message]:
            yield self._addressed(first)
            for item in items:
                yield from batcher.add(item)
            yield from batcher.rest()

        upload = Upload(messages())
        call = self._begin(method.future, iter(upload), deadline)
        upload.started(call)
        try:
            response = call.result()
            upload.check()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            upload.check()
            raise self._failed(error) from error
        finally:
            call.cancel()
        return response

    def _server_limits(self) -> types.Limits | None:
        if self._limits is None:
            method = self._stub(model_service_pb2_grpc.ModelServiceStub).GetModel
            try:
                response = self._call(method, model_service_pb2.GetModelRequest(), None)
            except exceptions.UnsupportedError:
                return None
            self._limits = responses.limits(response.model.limits)
        return self._limits


class Upload:
    """Runs the caller's iterable in gRPC's thread, and brings what it raises back to the caller.

    gRPC would log the exception and fail the call as UNKNOWN, which says nothing about a missing file.
    """

    def __init__(self, messages: Iterator[Any]) -> None:
        self._messages = messages
        self._call: Future[Any] = Future()
        self._failure: BaseException | None = None

    def started(self, call: Any) -> None:
        self._call.set_result(call)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._messages
        except Exception as error:
            self._failure = error
            # The thread may get here before the call was handed over.
            self._call.result().cancel()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
