"""Fixtures that many suites share: the tiny bundle and a running service on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.bundle import Bundle
from tests.support.service import Service, start_service
from tests.support.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A complete bundle of random weights."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def running_service(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`monofacet serve` on the tiny bundle, on free loopback ports, for the whole session."""
    log: Path = tmp_path_factory.mktemp("service") / "service.log"
    service = start_service(tiny.path, log)
    try:
        yield service
    finally:
        service.stop()
