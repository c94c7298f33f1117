"""The tiny bundle, built once; tests that damage it copy it first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Threads that spin while they wait slow a busy machine a hundredfold; read when torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from services.bundle import Bundle  # noqa: E402
from tests.support.tiny_bundle import make_tiny_bundle  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def copied(tiny: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
