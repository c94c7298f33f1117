"""The metrics port: a few threads, a bounded queue, and an end to connections that read slowly."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

# Scrapes at once: a pair of Prometheus servers and somebody who looks.
THREADS = 4
# Connections that are served or wait for a thread; one more is closed.
CONNECTIONS = 32
# Seconds that one may take from its thread on; a scrape takes milliseconds.
SECONDS = 10.0


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: there is a scrape every few seconds."""


class MetricsServer(WSGIServer):
    """Serves the metrics over HTTP, from threads of its own.

    Parameters
    ----------
    host, port
        Where to listen; port 0 takes a free one.
    registry
        What is served.

    Raises
    ------
    OSError
        When the port is taken.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="metrics")
        super().__init__((host, port), _Handler)
        self.set_app(make_wsgi_app(registry))
        self._accepting = threading.Thread(target=self.serve_forever, name="metrics", daemon=True)
        self._accepting.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection to a thread, or close it."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._threads.submit(self._serve, request, client_address)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        # A time limit of single reads and writes would let one byte in each keep the thread.
        limit = threading.Timer(SECONDS, _break, [request])
        limit.start()
        try:
            # Raised where the reader closes the connection before the end.
            with contextlib.suppress(OSError):
                self.finish_request(request, client_address)
        finally:
            limit.cancel()
            self.shutdown_request(request)
            self._places.release()

    def close(self) -> None:
        """Stop listening; whoever is being served is not waited for."""
        self.shutdown()
        self.server_close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _break(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
