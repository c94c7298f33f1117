"""The gateway's `grpc.aio` server: services, health, reflection, layers, and how it stops."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from monofacet.v1 import (
    feature_service_pb2,
    feature_service_pb2_grpc,
    modality_service_pb2,
    modality_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from prometheus_client import start_http_server

from deployments.gateway.catalogue import Catalogue
from deployments.gateway.encoder_client import EncoderClient, Send
from deployments.gateway.interceptors.chain import Chain, decoded_layer
from deployments.gateway.interceptors.deadlines import deadlines_layer
from deployments.gateway.interceptors.errors import errors_layer
from deployments.gateway.interceptors.limits import Admission
from deployments.gateway.interceptors.metrics import metrics_layer
from deployments.gateway.interceptors.validation import validation_layer
from deployments.gateway.servicers.feature import FeatureServicer
from deployments.gateway.servicers.modality import ModalityServicer, Score
from deployments.gateway.servicers.model import ModelServicer
from deployments.metrics import Metrics
from deployments.settings import MIB, Settings
from deployments.work import EncoderInfo

log = logging.getLogger("monofacet.gateway")

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (feature_service_pb2, "FeatureService"),
        (modality_service_pb2, "ModalityService"),
        (model_service_pb2, "ModelService"),
    )
)
# A message a little over the limit is answered by us, with a reason; only a far larger one by gRPC itself.
_SLACK_BYTES = 4 * MIB
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GatewayServer:
    """One gRPC server with its metrics port.

    Parameters
    ----------
    settings
        Of the server.
    catalogue
        What is served.
    """

    def __init__(self, settings: Settings, catalogue: Catalogue) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self.metrics = Metrics()
        self._admission = Admission(settings.max_concurrent_calls)
        self._health = health.aio.HealthServicer()
        self._server: Any = aio.server(
            interceptors=[
                Chain(
                    [
                        metrics_layer(self.metrics),
                        errors_layer(self.metrics, settings.retry_after_s),
                        self._admission.layer,
                        deadlines_layer(settings.default_deadline_s, settings.max_call_s),
                        decoded_layer,
                        validation_layer,
                    ],
                    settings.max_request_bytes,
                )
            ],
            options=[
                ("grpc.max_receive_message_length", settings.max_request_bytes + _SLACK_BYTES),
                ("grpc.max_send_message_length", settings.max_response_bytes),
                # Two servers on one port would share its callers between them without a word.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._metrics_server: Any = None

    async def start(self, send: Send, score: Score, info: EncoderInfo) -> tuple[int, int]:
        """Listen, and serve; called once the encoder is warm.

        Returns
        -------
        The gRPC port and the metrics port.
        """
        settings, catalogue = self._settings, self._catalogue
        encoder = EncoderClient(send, settings, self.metrics, info.backend)
        feature_service_pb2_grpc.add_FeatureServiceServicer_to_server(
            FeatureServicer(encoder, catalogue, settings, self.metrics), self._server
        )
        modality_service_pb2_grpc.add_ModalityServiceServicer_to_server(
            ModalityServicer(encoder, score, catalogue, settings, self.metrics), self._server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(catalogue, info, settings), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(_NOT_SERVING)
        port = self._server.add_insecure_port(f"{settings.host}:{settings.port}")
        await self._server.start()
        http, _ = start_http_server(settings.metrics_port, addr=settings.host, registry=self.metrics.registry)
        self._metrics_server = http
        self.metrics.model_info.labels(catalogue.bundle.id, catalogue.bundle.sha256, info.device).set(1)
        await self._set_health(_SERVING)
        return port, self.metrics_port

    @property
    def bundle_id(self) -> str:
        """Id of the bundle that is served."""
        return self._catalogue.bundle.id

    @property
    def metrics_port(self) -> int:
        """Port of the metrics, once started."""
        return int(self._metrics_server.server_port)

    async def drain(self) -> bool:
        """Say NOT_SERVING, refuse new calls, wait for those in flight, and stop.

        Returns
        -------
        Whether every call in flight finished by itself in time.
        """
        await self._health.enter_graceful_shutdown()
        self._admission.close()
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._admission.idle()
        except TimeoutError:
            log.warning("calls in flight were cut off after %.0f s", self._settings.drain_s)
            finished = False
        else:
            finished = True
        # Health stays reachable until here, so that a prober reads NOT_SERVING and not a refused connection.
        await self._server.stop(1.0)
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        return finished

    async def _set_health(self, status: Any) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, status)
