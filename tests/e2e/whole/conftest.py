"""The service that this package's tests share; it ends with the last of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.bundle import Bundle
from tests.support.service import Service, start_service
from tests.support.tiny_bias import with_bias
from tests.support.tiny_defense import with_defense
from tests.support.tiny_pipeline import add_tiny_pipeline


@pytest.fixture(scope="package")
def bundle(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("whole")
    calibrated = with_defense(with_bias(tiny, folder / "biased"), folder / "tiny")
    return add_tiny_pipeline(calibrated, "unclip")


@pytest.fixture(scope="package")
def service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    started = start_service(bundle.path, tmp_path_factory.mktemp("service") / "service.log")
    try:
        yield started
    finally:
        started.stop()
