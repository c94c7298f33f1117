"""uvicorn in the gateway's own event loop, with bounds on what a connection may cost."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deployments.gateway.http.tls import TlsContext
from deployments.operations.settings import Settings

# Bytes of the head of a request: its line and headers.
MAX_HEAD_BYTES = 32 * 1024
# Seconds beyond `untaken_s`: the chain, which says why, ends a stream that nobody reads before its connection is cut.
_MARGIN_S = 5.0
_BACKLOG = 1024
# Seconds between two looks whether the last requests have been answered.
_LOOK_S = 0.02


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 of one connection, ended when it costs others what they need.

    Attributes
    ----------
    max_connections
        One more is closed.
    head_s
        Seconds in which the head of a request must have come, from its first byte on, or from the connection's start.
        What is still sent of a request that was answered unread has as long.
    untaken_s
        Seconds in which the caller must take what was written.
    """

    max_connections: int
    head_s: float
    untaken_s: float
    _head: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or close it."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._head = self.loop.call_later(self.head_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Read; what belongs to no request in progress is the beginning of the next head."""
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if answering or between:
            self._head_came()
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.head_s, self.transport.abort)

    def on_response_complete(self) -> None:
        """Go on to the next request, whose beginning may have come."""
        cycle = self.cycle
        super().on_response_complete()
        if self.cycle is cycle and cycle.more_body and self._head is None:
            self._head = self.loop.call_later(self.head_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Give the caller some time to take what is written."""
        super().pause_writing()
        if self._untaken is None:
            self._untaken = self.loop.call_later(self.untaken_s + _MARGIN_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Forget the timer of `pause_writing`: the caller has taken it."""
        super().resume_writing()
        self._taken()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without requests, also where the caller has not taken the last answer."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.untaken_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._head_came()
        self._taken()

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None


class HttpServer:
    """Serves an ASGI application on a port of its own.

    Parameters
    ----------
    settings
        Of the server.
    application
        Answers requests.
    """

    def __init__(self, settings: Settings, application: Callable[..., Any]) -> None:
        self._settings = settings
        bounds = {
            "max_connections": settings.max_connections,
            "head_s": settings.handshake_s,
            "untaken_s": settings.untaken_s,
        }
        config = uvicorn.Config(
            application,
            http=type("Protocol", (BoundedProtocol,), bounds),
            ws="none",
            lifespan="off",
            interface="asgi3",
            loop="none",
            log_config=None,
            # It warns of every request that is none; what goes wrong in the application it tells as an error.
            log_level="error",
            access_log=False,
            # Headers of a proxy could be anybody's, so the caller is the address that is connected.
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=round(settings.connection_idle_s),
            reset_contextvars=True,
        )
        config.load()
        self._config = config
        # For what connections share. It listens and stops by itself only, with signals of its own and no setting for
        # the time of a handshake.
        self._server = uvicorn.Server(config)
        self._listeners: list[asyncio.Server] = []
        self._ticking: asyncio.Task[None] | None = None

    async def open(self) -> int:
        """Listen.

        Returns
        -------
        The port.

        Raises
        ------
        OSError
            When it is taken.
        """
        settings = self._settings
        tls = TlsContext(settings).context() if settings.tls_certificate is not None else None
        sockets = _sockets(settings.host, settings.http_port)
        self._listeners = [await self._listen(one, tls) for one in sockets]
        self._ticking = asyncio.create_task(self._tick())
        port: int = sockets[0].getsockname()[1]
        return port

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._server.server_state.connections)

    async def _listen(self, one: socket.socket, tls: ssl.SSLContext | None) -> Any:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self._config.http_protocol_class(  # type: ignore[call-arg]
                config=self._config, server_state=self._server.server_state, app_state={}, _loop=loop
            )
            return made

        handshake_s = self._settings.handshake_s if tls is not None else None
        return await loop.create_server(
            protocol, sock=one, ssl=tls, ssl_handshake_timeout=handshake_s, backlog=_BACKLOG
        )

    async def _tick(self) -> None:
        while True:
            # The header `date`.
            await self._server.on_tick(0)
            await asyncio.sleep(1)

    async def close(self, patience_s: float) -> None:
        """Accept no more, let what is in progress finish, and close.

        Parameters
        ----------
        patience_s
            Seconds that requests in progress are given.
        """
        state = self._server.server_state
        for listener in self._listeners:
            listener.close()
        for connection in list(state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while state.connections or state.tasks:
                    await asyncio.sleep(_LOOK_S)
        for connection in list(state.connections):
            connection.transport.abort()
        if self._ticking is not None:
            self._ticking.cancel()


def _sockets(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets at all addresses of a host, on one port.

    Raises
    ------
    OSError
        When none can be had, or one is taken.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        if sockets:
            # A free port that was taken for the first address is meant for all.
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        one = socket.socket(family, socket.SOCK_STREAM)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # `::` is every address, IPv4's included, as on the gRPC port.
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
            one.bind(address)
        except OSError as error:
            one.close()
            # A machine without IPv6 may know an address of that kind for a name.
            if error.errno != errno.EADDRNOTAVAIL:
                for other in sockets:
                    other.close()
                raise
            missing = error
        else:
            sockets.append(one)
    if not sockets and missing is not None:
        raise missing
    return sockets
