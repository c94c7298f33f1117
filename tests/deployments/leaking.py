"""Run by test_leaks in a process of its own: calls a gateway again and again and prints its resident memory.

`python -m tests.deployments.leaking ROUNDS CALLS LEAKY`
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import structlog
from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from deployments.encoder.encoder import Encoder
from deployments.gateway import layers
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.interceptors.chain import Call
from deployments.gateway.server import GatewayServer
from deployments.operations.settings import Settings
from tests.deployments.debug import DebugDictionary, DebugModel
from tests.support.tiny_bundle import make_tiny_bundle

kept: list[Any] = []


@asynccontextmanager
async def keeping(call: Call) -> AsyncIterator[None]:
    """Keep every request, as a careless cache would."""
    kept.append(call.request)
    yield


async def run(rounds: int, calls: int) -> list[float]:
    """Return the resident memory (MiB) after each round of `calls` calls of every kind."""
    with tempfile.TemporaryDirectory() as directory:
        bundle = make_tiny_bundle(Path(directory) / "tiny")
        settings = Settings(port=0, metrics_port=0, threads=1)
        dictionaries: Any = dict.fromkeys(bundle.dictionary_names, DebugDictionary())
        encoder = Encoder(settings, DebugModel(), dictionaries)

        async def score(_: Any) -> Any:
            raise AssertionError("nothing is scored here")

        server = GatewayServer(settings, Catalogue.read(bundle))
        port, _ = await server.start(encoder.encode, score, encoder.info())
        samples = []
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)

            async def encode(image: bytes) -> grpc.StatusCode:
                request = pb.EncodeRequest(inputs=[common.Input(image=common.Image(data=image))])
                code: grpc.StatusCode = await stub.Encode(request).code()
                return code

            for _ in range(rounds):
                for _ in range(calls):
                    # One in three fails: errors hold frames, and frames hold requests.
                    await asyncio.gather(
                        encode(os.urandom(300_000)), encode(os.urandom(300_000)), encode(b"bad")
                    )
                gc.collect()
                samples.append(psutil.Process().memory_info().rss / 2**20)
        await server.drain()
        await encoder.close()
        return samples


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    if sys.argv[3] == "leaky":
        layers.validation_layer = keeping  # type: ignore[assignment]
    print(json.dumps(asyncio.run(run(int(sys.argv[1]), int(sys.argv[2])))))
