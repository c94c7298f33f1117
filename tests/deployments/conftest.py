"""A gateway with a debug model behind it, in this process and without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from monofacet._status import error_from_rpc
from monofacet.v1 import feature_service_pb2_grpc, modality_service_pb2_grpc, model_service_pb2_grpc

from deployments.encoder.encoder import Encoder
from deployments.encoder.tasks import ScoreRequest
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.server import GatewayServer
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.modality.tables import ModalityTable
from tests.deployments.debug import DebugDictionary, DebugModel
from tests.support.waiting import PATIENCE_S


@dataclass
class Gateway:
    """A gateway in this process, and stubs to call it."""

    model: DebugModel
    encoder: Encoder
    server: GatewayServer
    channel: aio.Channel
    settings: Settings
    port: int

    @property
    def features(self) -> Any:
        return feature_service_pb2_grpc.FeatureServiceStub(self.channel)

    @property
    def modality(self) -> Any:
        return modality_service_pb2_grpc.ModalityServiceStub(self.channel)

    @property
    def models(self) -> Any:
        return model_service_pb2_grpc.ModelServiceStub(self.channel)

    def sample(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 when it was never observed."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


Open = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture
def open_gateway(tiny: Bundle) -> Open:
    """Return an async context manager that opens a gateway with the given settings."""
    catalogue = Catalogue.read(tiny)

    @asynccontextmanager
    async def opened(**overrides: Any) -> AsyncIterator[Gateway]:
        settings = Settings(
            **{
                "port": 0,
                "metrics_port": 0,
                "drain_s": PATIENCE_S,
                "linger_s": 0.0,
                "retry_after_s": 0.25,
                **overrides,
            }
        )
        model = DebugModel()
        dictionaries: Any = dict.fromkeys(tiny.dictionary_names, DebugDictionary())
        encoder = Encoder(settings, model, dictionaries)

        async def score(request: ScoreRequest) -> ModalityTable:
            answer = await encoder.score(request)
            if isinstance(answer, Exception):
                raise answer
            return answer

        server = GatewayServer(settings, catalogue)
        port, _ = await server.start(encoder.encode, score, encoder.info())
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        async with aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            try:
                yield Gateway(model, encoder, server, channel, settings, port)
            finally:
                model.release()
                await server.drain()
                await encoder.close()

    return opened


def error_details(error: aio.AioRpcError) -> tuple[str, list[str], float | None]:
    """Return a failed call's reason, the fields at fault, and the seconds of its RetryInfo."""
    trailing = dict(error.trailing_metadata() or ())
    return status_details(status_pb2.Status.FromString(trailing["grpc-status-details-bin"]))


def status_details(status: status_pb2.Status) -> tuple[str, list[str], float | None]:
    """Return the reason, the fields at fault and the RetryInfo seconds of a rich status."""
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    seconds = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            seconds = retry.retry_delay.ToTimedelta().total_seconds()
    assert info.domain == "monofacet"
    return info.reason, [violation.field for violation in bad.field_violations], seconds


def field_reasons(error: aio.AioRpcError) -> dict[str, str]:
    """Return the reason of each field at fault, as the client reads them."""
    return {violation.field: violation.reason for violation in error_from_rpc(error).violations}


def array(tensor: Any) -> np.ndarray[Any, Any]:
    """Return a float32 tensor message as an array."""
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))
