"""What all suites share: the tiny bundle, a running service on it, and how tests go to the workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads that spin while they wait slow a busy machine a hundredfold; read when torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from services.bundle import Bundle  # noqa: E402
from tests.support.processes import nothing_left  # noqa: E402
from tests.support.service import Service, start_service  # noqa: E402
from tests.support.tiny_bundle import make_tiny_bundle  # noqa: E402

ROOT = Path(__file__).parent
# Ray on several workers would be several clusters on the same cores, and no fixture could be shared.
WITH_RAY = "ray"


def starts_ray(item: pytest.Item) -> bool:
    """Tell whether a test needs `monofacet serve`: it asks for the shared one or lies in `tests/e2e`."""
    return "running_service" in getattr(item, "fixturenames", ()) or ROOT / "e2e" in item.path.parents


# Before pytest-xdist's own hook, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-n` and `--dist loadgroup`: all tests that start Ray go to one worker, others there file by file."""
    for item in items:
        group = WITH_RAY if starts_ray(item) else str(item.path.relative_to(ROOT))
        item.add_marker(pytest.mark.xdist_group(group))
    if hasattr(config, "workerinput"):
        # The longest group, so that no worker waits for it at the end.
        items.sort(key=lambda item: not starts_ray(item))


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Whatever the tests started has ended when the last of them has."""
    with nothing_left():
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The workers are as many as the cores. What a test starts chooses its threads itself."""
    torch.set_num_threads(1)


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
