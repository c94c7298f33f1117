"""The metrics port under callers who open, wait and read slowly."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from deployments.gateway import metrics_server
from deployments.gateway.metrics_server import MetricsServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    monkeypatch.setattr(metrics_server, "SECONDS", 0.5)
    registry = CollectorRegistry()
    Gauge("answer", "What is known.", registry=registry).set(42)
    made = MetricsServer("127.0.0.1", 0, registry)
    yield made
    made.close()


def scrape(server: MetricsServer) -> str:
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    return str(urllib.request.urlopen(url, timeout=60).read().decode())


def test_silent_connections_take_few_threads_and_are_closed(server: MetricsServer) -> None:
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(100)]
    try:
        for connection in silent:
            connection.settimeout(60)
            connection.send(b"GET /metr")
        # The acceptor and its threads were there or are counted here, each with its time limit.
        assert threading.active_count() <= before + 2 * metrics_server.THREADS
        # Each is closed in its turn, or at once.
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    finally:
        for connection in silent:
            connection.close()
    assert "answer 42.0" in scrape(server)


def test_one_byte_now_and_then_does_not_keep_a_thread(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as slow:
        slow.settimeout(0.05)
        sent, closed = 0, False
        while not closed:
            try:
                slow.send(b"x")
                sent += 1
                closed = slow.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
    assert sent > 1
    assert "answer 42.0" in scrape(server)


def test_it_listens_on_ipv6_too() -> None:
    registry = CollectorRegistry()
    try:
        made = MetricsServer("::1", 0, registry)
    except OSError:
        pytest.skip("this machine has no IPv6")
    made.close()
