"""Handshakes by the thousand, 16 at once, while the certificate rotates, against a process that could die of it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.certificates import Authority

AT_ONCE = 16
HANDSHAKES = 3_200
ROTATIONS = 8


@contextmanager
def server(certificate: Path, key: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "tests.deployments.access.tls_server", str(certificate), str(key)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def shake(port: int, authority: Authority) -> str:
    """Return what came of one handshake."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("localhost", port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            return "shaken"
    except OSError as error:
        return type(error).__name__


def test_a_storm_of_handshakes_with_rotations_in_it_kills_nothing_and_fails_nobody(tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def rotate() -> None:
        # One is of half a rotation, and is not taken.
        for path, content in zip((certificate, key), authority.issue(), strict=True):
            new = path.with_suffix(".new")
            new.write_bytes(content)
            new.replace(path)

    rotate()
    outcomes: Counter[str] = Counter()
    turns = iter(range(HANDSHAKES))
    lock = threading.Lock()

    def storm(port: int) -> None:
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            if turn % (HANDSHAKES // ROTATIONS) == HANDSHAKES // ROTATIONS // 2:
                rotate()
            outcome = shake(port, authority)
            with lock:
                outcomes[outcome] += 1

    with server(certificate, key) as (process, port):
        trusting = grpc.ssl_channel_credentials(authority.pem)
        with grpc.secure_channel(f"localhost:{port}", trusting) as standing:
            stub = health_pb2_grpc.HealthStub(standing)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            threads = [threading.Thread(target=storm, args=(port,)) for _ in range(AT_ONCE)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and process.poll() is None:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            for thread in threads:
                thread.join()
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert outcomes == {"shaken": HANDSHAKES}
            stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
