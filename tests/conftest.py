"""What all suites share: the tiny bundle, a running service on it, and how tests go to the workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

# Threads that spin while they wait slow a busy machine a hundredfold; read when torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from monofacet import Client  # noqa: E402

from services.bundle.load import Bundle  # noqa: E402
from tests.support.processes import nothing_left  # noqa: E402
from tests.support.service import START_TIMEOUT_S, Service, start_service  # noqa: E402
from tests.support.tiny_bias import with_bias  # noqa: E402
from tests.support.tiny_bundle import make_tiny_bundle  # noqa: E402
from tests.support.tiny_defense import with_defense  # noqa: E402
from tests.support.tiny_pipeline import add_tiny_pipeline  # noqa: E402
from tests.support.waiting import CALL_S

# What `nohup` starts ignores SIGHUP, and so would every server of a test.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# An example that takes long on a busy machine is no failure.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# Where tests start Ray. On several workers it would be several clusters on the same cores, without shared fixtures.
WITH_RAY = ("tests/e2e/", "tests/foreign/", "tests/observability/")


# Optional: with `-p no:xdist` nobody knows it.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """With `-n`: all tests that start Ray go to one worker, others there file by file."""

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(WITH_RAY) else super()._split_scope(nodeid)

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest group first, so that no worker waits for it at the end."""
    for item in items:
        if "running_service" in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(WITH_RAY):
            raise pytest.UsageError(
                f"{item.nodeid}: tests with a running service lie in {', '.join(WITH_RAY)}"
            )
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(WITH_RAY))


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
def served(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with all that a bundle can have: both calibrations and a pipeline."""
    folder = tmp_path_factory.mktemp("served")
    calibrated = with_defense(with_bias(tiny, folder / "biased"), folder / "tiny")
    return add_tiny_pipeline(calibrated, "unclip")


@pytest.fixture(scope="session")
def running_service(served: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`monofacet serve` on that bundle, on free loopback ports, with every model warm, for the whole session."""
    # What is compared to this process's own numbers must not depend on whether the processor has bf16; services that
    # other tests start take what it has.
    service = start_service(
        served.path,
        tmp_path_factory.mktemp("service") / "service.log",
        environment={"MONOFACET_PRECISION": "f32"},
    )
    try:
        with Client(service.target, timeout=CALL_S) as client:
            # The generator is warmed after the rest is ready; what a test measures must not contain that.
            client.generate("red circle", seeds=1, timeout=START_TIMEOUT_S)
        yield service
    finally:
        service.stop()
