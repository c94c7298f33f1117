"""Short names for the bundle that has everything and the service on it, which all end-to-end tests share."""

from __future__ import annotations

import pytest

from services.bundle.load import Bundle
from tests.support.service import Service


@pytest.fixture(scope="session")
def bundle(served: Bundle) -> Bundle:
    return served


@pytest.fixture(scope="session")
def service(running_service: Service) -> Service:
    return running_service
