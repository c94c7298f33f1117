"""Tiny pipelines of each kind, made and loaded once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from services.bundle.load import Bundle
from services.imaging.generator import ImageRequest, Imaging
from tests.support.tiny_pipeline import Kind, add_tiny_pipeline

Load = Callable[[Kind], tuple[Bundle, Imaging]]


@pytest.fixture(scope="session")
def load_kind(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a function from a kind of pipeline to its bundle and its loaded imaging."""
    made: dict[str, tuple[Bundle, Imaging]] = {}

    def load(kind: Kind) -> tuple[Bundle, Imaging]:
        if kind not in made:
            path = Path(shutil.copytree(tiny.path, tmp_path_factory.mktemp("pipelines") / kind))
            bundle = add_tiny_pipeline(Bundle.load(path), kind)
            imaging = Imaging.load(bundle, threads=1)
            # As at the service's start: on some processors a row's bits depend on the batch, and batches are not free.
            imaging.denoiser.calibrate(imaging.prepare(ImageRequest()), 16)
            made[kind] = bundle, imaging
        return made[kind]

    return load
