"""A gateway with a debug pipeline and a tiny encoder behind it, in this process and without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from grpc import aio
from monofacet.v1 import common_pb2, imaging_service_pb2_grpc
from monofacet.v1 import imaging_service_pb2 as pb

from deployments.encoder.encoder import Encoder
from deployments.encoder.model import TowerModel, load_dictionaries
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.server import GatewayServer
from deployments.generator.events import Events, Failed, GeneratorInfo
from deployments.generator.generator import Generator
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.bundle.manifest import DiffusionEntry
from tests.deployments.debug_generation import DebugPipeline

ENTRY = DiffusionEntry("StableUnCLIPImg2ImgPipeline", "embedding", "f" * 64, 64, 64, 4, 3.0)


INFO = GeneratorInfo("cpu", "fp32", 1, ("embedding",), True, "free", 1)


@dataclass
class Gateway:
    """A gateway in this process."""

    model: DebugPipeline
    server: GatewayServer
    channel: aio.Channel
    bundle: Bundle

    @property
    def imaging(self) -> Any:
        return imaging_service_pb2_grpc.ImagingServiceStub(self.channel)

    def sample(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


Open = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture(scope="module")
def encoder_parts(tiny: Bundle) -> tuple[Any, Any]:
    return TowerModel(tiny, Settings(backend="torch", threads=1)), load_dictionaries(tiny)


@pytest.fixture
def open_gateway(tiny: Bundle, encoder_parts: tuple[Any, Any]) -> Open:
    @asynccontextmanager
    async def opened(
        pipeline: bool = True, warm: bool = True, bundle: Bundle = tiny, **overrides: Any
    ) -> AsyncIterator[Gateway]:
        settings = Settings(
            **{"port": 0, "metrics_port": 0, "drain_s": 5.0, "max_queue_s": 60.0, **overrides}
        )
        manifest = dataclasses.replace(bundle.manifest, diffusion=ENTRY) if pipeline else bundle.manifest
        bundle = dataclasses.replace(bundle, manifest=manifest)
        model = DebugPipeline()
        generator = Generator(settings, model)
        encoder = Encoder(settings, *encoder_parts)

        async def stream(method: str, *args: Any) -> AsyncIterator[Events]:
            try:
                async for message in getattr(generator, method)(*args):
                    yield message
            except Exception as error:
                yield Events((Failed(error),))

        server = GatewayServer(settings, Catalogue.read(bundle))
        port, _ = await server.open()
        score: Any = encoder.score
        await server.serve(encoder.encode, score, encoder.info(), stream if pipeline else None)
        if pipeline and warm:
            await server.generate(INFO)
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                yield Gateway(model, server, channel, bundle)
            finally:
                model.release()
                await server.drain()

    return opened


async def events(call: Any) -> list[Any]:
    return [response async for response in call]


def preview(**steering: Any) -> pb.PreviewSteeringRequest:
    edit = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT, scale=3.0)
    return pb.PreviewSteeringRequest(
        input=common_pb2.Input(text="red circle"), steering=pb.Steering(**{"edits": [edit], **steering})
    )
