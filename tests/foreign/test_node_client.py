"""A client in another language works from the .proto files alone, and gets what Python gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from monofacet import Client
from monofacet.testing import run_server

from tests.foreign.conftest import Run
from tests.support.waiting import CALL_S

TEXT = "ein roter Kreis 🔴"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "circle.png"
    image = PIL.Image.new("RGB", (64, 64), "white")
    PIL.ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill="red")
    image.save(path)
    return path


def compare(target: str, picture: Path, node: Run) -> None:
    foreign = node("encode.mjs", target, picture, TEXT)
    with Client(target, timeout=CALL_S) as client:
        ours = client.encode([picture, TEXT], dictionary="")
    assert foreign["bundle"] == ours.bundle
    assert foreign["shape"] == list(ours.embeddings.shape)
    # 1e-6 is what clients of the contract are held to: float32 arrives bit by bit, and the same batch gives
    # the same floats.
    assert np.allclose(foreign["embeddings"], ours.embeddings, rtol=0, atol=1e-6)
    assert np.allclose(foreign["norms"], ours.norms, rtol=1e-6)
    for theirs, features in zip(foreign["features"], ours.features, strict=True):
        assert theirs["dictionary"] == features.dictionary
        assert theirs["indices"] == features.indices.tolist()
        assert np.allclose(theirs["values"], features.values, rtol=1e-6)
    assert [answer["id"] for answer in foreign["streamed"]] == ["image", "bad", "text"]
    assert [answer["error"] for answer in foreign["streamed"]] == [None, "INVALID_ARGUMENT", None]


def test_node_and_python_read_the_same_from_a_fake(picture: Path, node: Run) -> None:
    with run_server() as target:
        compare(target, picture, node)


def test_node_and_python_read_the_same_from_the_service(
    running_service: Any, picture: Path, node: Run
) -> None:
    compare(running_service.target, picture, node)


def test_the_service_refuses_a_foreign_clients_empty_batch(
    running_service: Any, picture: Path, node: Run
) -> None:
    assert node("encode.mjs", running_service.target, picture, TEXT)["refused"] == "INVALID_ARGUMENT"
