"""Calls of ModelService and of the standard health service."""

from __future__ import annotations

from grpc_health.v1 import health_pb2, health_pb2_grpc

from monofacet import _exceptions as exceptions
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._async.core import AsyncCore
from monofacet._base import Deadline
from monofacet.v1 import model_service_pb2, model_service_pb2_grpc


class ModelCalls(AsyncCore):
    """What the server serves, within which limits, and whether it is ready."""

    async def model(self, bundle: str = "", *, timeout: float | None = None) -> types.Model:
        """Describe one bundle; see `Client.model`."""
        stub = self._stub(model_service_pb2_grpc.ModelServiceStub)
        response = await self._call(stub.GetModel, model_service_pb2.GetModelRequest(bundle=bundle), timeout)
        return responses.model(response.model, response.server_version)

    async def models(self, *, timeout: float | None = None) -> tuple[types.Model, ...]:
        """Describe every bundle that the server serves; see `Client.models`."""
        stub = self._stub(model_service_pb2_grpc.ModelServiceStub)
        response = await self._call(stub.ListModels, model_service_pb2.ListModelsRequest(), timeout)
        return tuple(responses.model(message, response.server_version) for message in response.models)

    async def health(self, service: str = "", *, timeout: float = 5.0) -> str:
        """Ask whether the server, or one service of it, is ready; see `Client.health`."""
        deadline = Deadline(timeout)
        stub = self._stub(health_pb2_grpc.HealthStub)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._once(stub.Check, request, deadline)
        except exceptions.NotFoundError:
            return "SERVICE_UNKNOWN"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
