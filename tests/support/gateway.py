"""A gateway and an encoder with real towers, in this process and without Ray."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from grpc import aio
from monofacet.v1 import (
    bias_service_pb2_grpc,
    defense_service_pb2_grpc,
    feature_service_pb2_grpc,
    model_service_pb2_grpc,
)

from deployments.encoder.encoder import Encoder
from deployments.encoder.model import TowerModel, load_dictionaries
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.server import GatewayServer
from deployments.operations.settings import Settings
from services.bundle.load import Bundle


class Counting:
    """Real towers that count what goes through them."""

    def __init__(self, model: TowerModel) -> None:
        self.model = model
        self.images = self.texts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def items(self) -> int:
        return self.images + self.texts

    def encode_images(self, pixels: np.ndarray) -> Any:
        self.images += len(pixels)
        return self.model.encode_images(pixels)

    def encode_texts(self, tokens: np.ndarray) -> Any:
        self.texts += len(tokens)
        return self.model.encode_texts(tokens)


@dataclass
class Served:
    """A channel to the gateway, stubs to call it, and what is behind it."""

    channel: aio.Channel
    server: GatewayServer
    model: Counting

    @property
    def bias(self) -> Any:
        return bias_service_pb2_grpc.BiasServiceStub(self.channel)

    @property
    def defense(self) -> Any:
        return defense_service_pb2_grpc.DefenseServiceStub(self.channel)

    @property
    def models(self) -> Any:
        return model_service_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def features(self) -> Any:
        return feature_service_pb2_grpc.FeatureServiceStub(self.channel)

    def sample(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 when it was never observed."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


Open = Callable[..., AbstractAsyncContextManager[Served]]


@asynccontextmanager
async def serve_here(bundle: Bundle, **overrides: Any) -> AsyncIterator[Served]:
    """Serve a bundle with the given settings."""
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
            yield Served(channel, server, model)
        finally:
            await server.drain()
            await encoder.close()
