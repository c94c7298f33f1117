"""The tiny bundle, built once; tests that damage it copy it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from services.bundle.load import Bundle


@pytest.fixture
def copied(tiny: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
