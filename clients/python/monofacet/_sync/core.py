"""What all calls of the synchronous client go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import stamina
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._base import BaseClient, Batcher, Deadline, is_small, split_within
from monofacet._config import TLS, Retry, Timeout
from monofacet._inputs import Input, to_inputs
from monofacet._status import error_from_rpc, shift_violations
from monofacet.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc

Response = TypeVar("Response")
Stub = TypeVar("Stub")


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
        channel: grpc.Channel | None = None,
    ) -> None:
        super().__init__(
            target, token=token, tls=tls, timeout=timeout, retry=retry, channel=channel, bundle=bundle
        )
        self._channel = channel if channel is not None else self._open()
        self._stubs: dict[type[Any], Any] = {}

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
        """Close the connection. Calls in progress fail."""
        if self._given_channel is None and self._owner is None:
            self._channel.close()

    def _call(self, method: Callable[..., Response], request: Any, timeout: float | None) -> Response:
        deadline = Deadline(self._timeout.call if timeout is None else timeout)
        self._addressed(request)
        for attempt in stamina.retry_context(**self._retrying(deadline)):
            with attempt:
                try:
                    return method(request, timeout=deadline.left(), metadata=self._metadata)
                except grpc.RpcError as error:
                    raise error_from_rpc(error) from error
        raise exceptions.ServerError("no try was made", code="UNKNOWN")  # unreachable: attempts is at least 1

    def _in_parts(
        self,
        inputs: Input | Iterable[Input],
        method: Callable[..., Response],
        request: Callable[[Sequence[common_pb2.Input]], Message],
        timeout: float | None,
        *,
        field: str = "inputs",
        reserved: int = 0,
    ) -> tuple[list[Response], list[int]]:
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
        call = method.future(iter(upload), timeout=deadline.left(), metadata=self._metadata)
        upload.started(call)
        try:
            response = call.result()
            upload.check()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            upload.check()
            raise error_from_rpc(error) from error
        finally:
            call.cancel()
        return response

    def _stub(self, kind: type[Stub]) -> Stub:
        if self._owner is not None:
            return self._owner._stub(kind)
        if kind not in self._stubs:
            self._stubs[kind] = kind(self._channel)  # type: ignore[call-arg]
        stub: Stub = self._stubs[kind]
        return stub

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
