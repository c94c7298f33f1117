"""Calls of a servicer in this process: what the synchronous and the asyncio channel share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from monofacet._status import DETAILS_KEY
from monofacet.testing._fake import FakeMonofacet
from monofacet.testing._status import status_with_details


@dataclass(frozen=True)
class _CallDetails:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


class MockRpcError(grpc.RpcError):  # type: ignore[misc]
    """What a mock call raises: as gRPC's own errors, it has a code, details and trailing metadata."""

    def __init__(
        self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        """Get the status code."""
        return self._code

    def details(self) -> str:
        """Get the message."""
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Get the trailing metadata."""
        return self._metadata


class MockContext:
    """What a servicer sees of a call.

    Parameters
    ----------
    metadata
        That the client sent.
    timeout
        Seconds that the client allows.
    """

    def __init__(self, metadata: tuple[tuple[str, str], ...], timeout: float | None) -> None:
        self._metadata, self._timeout = metadata, timeout

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Get the metadata that the client sent."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Get the seconds that the client allows; no time passes in a mock."""
        return self._timeout

    def is_active(self) -> bool:
        """Tell that the call is active."""
        return True

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with an error."""
        raise MockRpcError(code, details)

    def abort_with_status(self, status: Any) -> NoReturn:
        """End the call with a status that carries details."""
        raise MockRpcError(status.code, status.details, tuple(status.trailing_metadata or ()))


class _Server:
    """Stands in for a `grpc.Server` while a servicer is added: keeps the handlers."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Do nothing: the generic handlers hold the same."""


class Mock:
    """Finds and runs handlers; the two channels differ in how they wait.

    Parameters
    ----------
    service
        What answers. Default a new `FakeMonofacet`.
    """

    def __init__(self, service: FakeMonofacet | None = None) -> None:
        self.service = service or FakeMonofacet()
        server = _Server()
        self.service.add_to_server(server)
        self._handlers = server.handlers
        self._failures: deque[MockRpcError] = deque()
        self.calls: list[tuple[str, Any]] = []
        self.metadata: list[tuple[tuple[str, str], ...]] = []
        self.timeouts: list[float | None] = []

    def fail(
        self,
        code: grpc.StatusCode,
        message: str = "made to fail",
        *,
        reason: str = "",
        violations: dict[str, str] | None = None,
        retry_after: float | None = None,
        times: int = 1,
    ) -> None:
        """Make the next calls fail.

        Parameters
        ----------
        code
            Status code of the failure.
        message
            Its message.
        reason
            Of its ErrorInfo.
        violations
            Descriptions by field path, for its BadRequest.
        retry_after
            Seconds, for its RetryInfo.
        times
            How many calls fail.
        """
        status = status_with_details(
            code, message, reason=reason, violations=violations, retry_after=retry_after
        )
        metadata = ((DETAILS_KEY, status.SerializeToString()),)
        self._failures.extend([MockRpcError(code, message, metadata)] * times)

    def begin(
        self, path: str, metadata: Iterable[tuple[str, str]] | None, timeout: float | None
    ) -> tuple[Any, MockContext]:
        """Find the handler of a call, and note the call.

        Parameters
        ----------
        path
            ``/package.Service/Method``.
        metadata, timeout
            As given by the client.

        Returns
        -------
        tuple
            The handler and the call's context.

        Raises
        ------
        MockRpcError
            If the call was made to fail, or nothing handles it.
        """
        sent = tuple(metadata or ())
        self.metadata.append(sent)
        self.timeouts.append(timeout)
        if self._failures:
            self.calls.append((path, None))
            raise self._failures.popleft()
        for handlers in self._handlers:
            handler = handlers.service(_CallDetails(path, sent))
            if handler is not None:
                return handler, MockContext(sent, timeout)
        raise MockRpcError(grpc.StatusCode.UNIMPLEMENTED, f"{path} is not served")

    def receive(self, path: str, handler: Any, data: bytes) -> Any:
        """Read a request as the server would, and note it.

        Parameters
        ----------
        path
            Of the call.
        handler
            Of the call.
        data
            The serialised request.

        Returns
        -------
        Message
            The request.
        """
        request = handler.request_deserializer(data)
        self.calls.append((path, request))
        return request
