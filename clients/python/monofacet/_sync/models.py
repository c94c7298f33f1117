# Generated from ../_async/models.py by tools/sync_side.py: edit that one, and run `make protos`.
"""Calls of ModelService and of the standard health service."""

from __future__ import annotations

from grpc_health.v1 import health_pb2, health_pb2_grpc

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._base import Deadline
from monofacet._convert import read
from monofacet._sync.core import SyncCore
from monofacet.v1 import model_service_pb2, model_service_pb2_grpc


class ModelCalls(SyncCore):
    """What the server serves, within which limits, and whether it is ready."""

    def model(self, bundle: str = "", *, timeout: float | None = None) -> types.Model:
        """Describe one bundle.

        Parameters
        ----------
        bundle
            Its name or id; empty for the one that answers this client's calls.
        timeout
            Seconds for the call, all its tries included.

        Returns
        -------
        Model
            With its files and every limit of the server.
        """
        stub = self._stub(model_service_pb2_grpc.ModelServiceStub)
        response = self._call(stub.GetModel, model_service_pb2.GetModelRequest(bundle=bundle), timeout)
        return read(types.Model, response.model, server_version=response.server_version)

    def models(self, *, timeout: float | None = None) -> tuple[types.Model, ...]:
        """Describe every bundle that the server serves.

        Parameters
        ----------
        timeout
            Seconds for the call, all its tries included.

        Returns
        -------
        tuple of Model
            Without their files; the server's default first.
        """
        stub = self._stub(model_service_pb2_grpc.ModelServiceStub)
        response = self._call(stub.ListModels, model_service_pb2.ListModelsRequest(), timeout)
        version = response.server_version
        return tuple(read(types.Model, message, server_version=version) for message in response.models)

    def health(self, service: str = "", *, timeout: float = 5.0) -> str:
        """Ask whether the server, or one service of it, is ready. Never tried again: the answer is about now.

        Parameters
        ----------
        service
            Full name such as ``monofacet.v1.FeatureService``; empty for the whole server.
        timeout
            Seconds.

        Returns
        -------
        str
            ``SERVING``, ``NOT_SERVING``, or ``SERVICE_UNKNOWN``.

        Raises
        ------
        UnavailableError
            If nothing answers.
        """
        deadline = Deadline(timeout)
        stub = self._stub(health_pb2_grpc.HealthStub)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = self._once(stub.Check, request, deadline)
        except exceptions.NotFoundError:
            return "SERVICE_UNKNOWN"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
