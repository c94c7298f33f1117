"""Clients of a fake, and a fake on a real port."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from monofacet._async_client import AsyncClient
from monofacet._client import Client
from monofacet.testing._channel import MockAioChannel, MockChannel
from monofacet.testing._fake import FakeMonofacet


def mock_client(service: FakeMonofacet | None = None, **options: Any) -> tuple[Client, MockChannel]:
    """Make a client of a fake.

    Parameters
    ----------
    service
        What answers. Default a new `FakeMonofacet`.
    **options
        Of `Client`, such as ``token`` and ``retry``.

    Returns
    -------
    tuple
        The client, and its channel with the calls that it saw.
    """
    channel = MockChannel(service)
    return Client("localhost:9000", channel=channel, **options), channel


def mock_async_client(
    service: FakeMonofacet | None = None, **options: Any
) -> tuple[AsyncClient, MockAioChannel]:
    """Make an asyncio client of a fake.

    Parameters
    ----------
    service
        What answers. Default a new `FakeMonofacet`.
    **options
        Of `AsyncClient`, such as ``token`` and ``retry``.

    Returns
    -------
    tuple
        The client, and its channel with the calls that it saw.
    """
    channel = MockAioChannel(service)
    return AsyncClient("localhost:9000", channel=channel, **options), channel


@contextmanager
def run_server(
    service: FakeMonofacet | None = None,
    *,
    credentials: grpc.ServerCredentials | None = None,
    threads: int = 8,
) -> Iterator[str]:
    """Serve a fake on a free loopback port.

    Parameters
    ----------
    service
        What answers. Default a new `FakeMonofacet`.
    credentials
        For TLS. Default plain text.
    threads
        Calls that are worked on at the same time.

    Yields
    ------
    str
        ``localhost:port``.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_workers=threads),
        options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)],
    )
    (service or FakeMonofacet()).add_to_server(server)
    if credentials is None:
        port = server.add_insecure_port("localhost:0")
    else:
        port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(grace=None).wait()
