"""BiasService behind a gateway and an encoder with real, tiny towers, in this process and without Ray."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import bias_service_pb2_grpc, common_pb2, feature_service_pb2_grpc

from deployments.encoder import Encoder
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.server import GatewayServer
from deployments.model import TowerModel, load_dictionaries
from deployments.settings import Settings
from services.bundle import Bundle
from tests.support.tiny_bias import with_bias

CODE = grpc.StatusCode


def words(text: str) -> common_pb2.Input:
    return common_pb2.Input(text=text)


class Counting:
    """A tower model that counts what it embeds."""

    def __init__(self, model: TowerModel) -> None:
        self.model = model
        self.items = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_images(self, pixels: np.ndarray) -> Any:
        self.items += len(pixels)
        return self.model.encode_images(pixels)

    def encode_texts(self, tokens: np.ndarray) -> Any:
        self.items += len(tokens)
        return self.model.encode_texts(tokens)


class Service:
    """Stubs, and what happened behind them."""

    def __init__(self, channel: aio.Channel, server: GatewayServer, model: Counting) -> None:
        self.bias: Any = bias_service_pb2_grpc.BiasServiceStub(channel)
        self.features: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)
        self.server = server
        self.model = model


@pytest.fixture(scope="module")
def biased(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_bias(tiny, tmp_path_factory.mktemp("biased") / "tiny")


Open = Callable[..., Any]


@pytest.fixture
def opened(biased: Bundle) -> Open:
    @asynccontextmanager
    async def run(bundle: Bundle = biased, **overrides: Any) -> AsyncIterator[Service]:
        settings = Settings(
            **{"port": 0, "metrics_port": 0, "drain_s": 5.0, "backend": "torch", "threads": 1, **overrides}
        )
        model: Any = Counting(TowerModel(bundle, settings))
        encoder = Encoder(settings, model, load_dictionaries(bundle))

        async def score(request: Any) -> Any:
            # As between processes: whatever cannot be pickled fails here.
            answer = pickle.loads(pickle.dumps(await encoder.score(pickle.loads(pickle.dumps(request)))))
            if isinstance(answer, Exception):
                raise answer
            return answer

        server = GatewayServer(settings, Catalogue.read(bundle))
        port, _ = await server.start(encoder.encode, score, encoder.info())
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                yield Service(channel, server, model)
            finally:
                await server.drain()
                await encoder.close()

    return run
