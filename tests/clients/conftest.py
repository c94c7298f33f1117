"""Either client against the mock transport."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import monofacet.v1
import PIL.Image
import pytest
from monofacet import AsyncClient, Client, Retry
from monofacet.testing import FakeMonofacet, MockAioChannel, MockChannel, mock_async_client, mock_client

FAST = Retry(attempts=3, wait_initial=0.001, wait_jitter=0)


Call = Callable[..., Any]


def contract_files() -> list[Any]:
    """Return the descriptor of every file of the contract: of every stub that the package has."""
    stubs = Path(monofacet.v1.__path__[0]).glob("[!_]*_pb2.py")
    return [importlib.import_module(f"monofacet.v1.{path.stem}").DESCRIPTOR for path in sorted(stubs)]


def contract_methods() -> dict[str, Any]:
    """Return the descriptor of every method of the contract by its path, `/monofacet.v1.Service/Method`."""
    return {
        f"/{service.full_name}/{method.name}": method
        for file in contract_files()
        for service in file.services_by_name.values()
        for method in service.methods
    }


class Both:
    """Runs a call on either client, and waits for it."""

    def __init__(self, asynchronous: bool, service: FakeMonofacet | None = None, **options: Any) -> None:
        self.asynchronous = asynchronous
        self.client: Client | AsyncClient
        self.channel: MockChannel | MockAioChannel
        options.setdefault("retry", FAST)
        if asynchronous:
            self.client, self.channel = mock_async_client(service, **options)
        else:
            self.client, self.channel = mock_client(service, **options)

    def __getattr__(self, name: str) -> Call:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            value = method(*args, **kwargs)
            if inspect.isasyncgen(value):
                return asyncio.run(collect(value))
            if inspect.isawaitable(value):
                return asyncio.run(wait(value))
            return list(value) if isinstance(value, Iterator) else value

        return call


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def wait(value: Any) -> Any:
    return await value


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def both(request: pytest.FixtureRequest) -> Callable[..., Both]:
    return lambda *args, **kwargs: Both(request.param, *args, **kwargs)


@pytest.fixture()
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (8, 8), "red").save(path)
    return path
