"""Services that join a server which is already open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc


class DeferredServices(grpc.GenericRpcHandler):  # type: ignore[misc]
    """One handler that is registered before the server starts and learns its services afterwards.

    gRPC takes no services once it has started; it asks this one at every call. The generated
    `add_...Servicer_to_server` functions take it in place of the server.
    """

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Take the handlers of one service."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take no notice: this is a second form of the same handlers."""

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a method, or None."""
        for handler in self._handlers:
            found = handler.service(handler_call_details)
            if found is not None:
                return found
        return None
