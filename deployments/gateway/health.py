"""The standard health service, with bounds: anybody may call it, also without a token.

The one of grpcio-health-checking keeps a lock while it writes to a watcher, so one that takes no answers would keep the
server from saying that it stops; and it keeps a list for every name that a watcher makes up.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from deployments.gateway.interceptors.chain import host_of
from deployments.gateway.interceptors.reading import share

# Longer than the name of any service.
MAX_NAME_BYTES = 256
_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says which services serve.

    Parameters
    ----------
    max_watchers
        Watch calls at once; half of them from one address.
    """

    def __init__(self, max_watchers: int) -> None:
        self._max_watchers = max_watchers
        self._watchers: Counter[str] = Counter()
        self._status: dict[str, Any] = {"": _NOT_SERVING}
        self._changed = asyncio.Event()
        self._ending = False

    def set(self, service: str, status: Any) -> None:
        """Say how a service is; once the server ends it stays NOT_SERVING."""
        if self._ending:
            return
        self._status[service] = status
        self._tell()

    def end(self) -> None:
        """Say NOT_SERVING for good."""
        for service in self._status:
            self._status[service] = _NOT_SERVING
        self._ending = True
        self._tell()

    def serving(self) -> dict[str, bool]:
        """Return whether each service serves, by name; the empty name is the server."""
        return {name: status == pb.HealthCheckResponse.SERVING for name, status in self._status.items()}

    def _tell(self) -> None:
        # Each watcher waits for the event that was there when it looked.
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:  # noqa: N802
        """Say how a service is."""
        status = self._status.get(await _name(request, context))
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return pb.HealthCheckResponse(status=status)

    async def List(self, request: pb.HealthListRequest, context: Any) -> pb.HealthListResponse:  # noqa: N802
        """Say how all services are."""
        return pb.HealthListResponse(
            statuses={name: pb.HealthCheckResponse(status=status) for name, status in self._status.items()}
        )

    async def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Any
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """Say how a service is, and again whenever that changes."""
        name, host = await _name(request, context), host_of(context.peer())
        if self._watchers.total() >= self._max_watchers or self._watchers[host] >= share(self._max_watchers):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers; try later")
        self._watchers[host] += 1
        try:
            sent = None
            while True:
                changed, status = self._changed, self._status.get(name, _UNKNOWN)
                if status != sent:
                    yield pb.HealthCheckResponse(status=status)
                    sent = status
                else:
                    await changed.wait()
        finally:
            self._watchers[host] -= 1
            if not self._watchers[host]:
                del self._watchers[host]


async def _name(request: pb.HealthCheckRequest, context: Any) -> str:
    if len(request.service.encode()) > MAX_NAME_BYTES:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a name has {MAX_NAME_BYTES} bytes at most")
    return str(request.service)
