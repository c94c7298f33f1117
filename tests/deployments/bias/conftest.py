"""BiasService behind a gateway and an encoder with real, tiny towers."""

from __future__ import annotations

from functools import partial

import grpc
import pytest
from monofacet.v1 import common_pb2

from services.bundle.load import Bundle
from tests.support.gateway import Open, serve_here
from tests.support.tiny_bias import with_bias

CODE = grpc.StatusCode


def words(text: str) -> common_pb2.Input:
    return common_pb2.Input(text=text)


@pytest.fixture(scope="module")
def biased(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_bias(tiny, tmp_path_factory.mktemp("biased") / "tiny")


@pytest.fixture
def opened(biased: Bundle) -> Open:
    return partial(serve_here, bundle=biased)
