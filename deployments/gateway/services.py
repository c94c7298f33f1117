"""The services that the gateway serves, and what answers their calls for one bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from monofacet.v1 import (
    bias_service_pb2,
    bias_service_pb2_grpc,
    defense_service_pb2,
    defense_service_pb2_grpc,
    feature_service_pb2,
    feature_service_pb2_grpc,
    imaging_service_pb2,
    imaging_service_pb2_grpc,
    modality_service_pb2,
    modality_service_pb2_grpc,
    model_service_pb2,
)

from deployments.gateway.admission.client_streams import ClientStreams
from deployments.gateway.bundles import Backend
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.decoders import Decoders
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.servicers.bias import BiasServicer, RunAudit
from deployments.gateway.servicers.defense import DefenseServicer
from deployments.gateway.servicers.feature import FeatureServicer
from deployments.gateway.servicers.imaging import ImagingServicer
from deployments.gateway.servicers.modality import ModalityServicer
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings

# What is served; a service joins by a line here and one in `servicers_of`.
DESCRIPTORS = tuple(
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (feature_service_pb2, "FeatureService"),
        (modality_service_pb2, "ModalityService"),
        (bias_service_pb2, "BiasService"),
        (imaging_service_pb2, "ImagingService"),
        (defense_service_pb2, "DefenseService"),
        (model_service_pb2, "ModelService"),
    )
)
SERVICES = tuple(descriptor.full_name for descriptor in DESCRIPTORS)
# Those whose calls each go to the servicer of their bundle.
ROUTED: tuple[tuple[Any, Callable[..., None]], ...] = tuple(
    zip(
        DESCRIPTORS[:-1],
        (
            feature_service_pb2_grpc.add_FeatureServiceServicer_to_server,
            modality_service_pb2_grpc.add_ModalityServiceServicer_to_server,
            bias_service_pb2_grpc.add_BiasServiceServicer_to_server,
            imaging_service_pb2_grpc.add_ImagingServiceServicer_to_server,
            defense_service_pb2_grpc.add_DefenseServiceServicer_to_server,
        ),
        strict=True,
    )
)
IMAGING = imaging_service_pb2.DESCRIPTOR.services_by_name["ImagingService"].full_name
# The unary calls that need a forward of the towers.
ENCODING = frozenset(
    f"monofacet.v1.{method}"
    for method in (
        "FeatureService/Encode",
        "ModalityService/ClassifyModality",
        "BiasService/ClassifyGender",
        "DefenseService/FilterAdversarial",
        "ImagingService/PreviewSteering",
    )
)


def servicers_of(
    backend: Backend,
    catalogue: Catalogue,
    encoder: EncoderClient,
    generator_name: str,
    streams: ClientStreams,
    settings: Settings,
    metrics: Metrics,
) -> dict[str, Any]:
    """Return the servicers of one bundle, by the name of their service.

    Parameters
    ----------
    backend
        What computes for the bundle.
    catalogue
        What the gateway knows of it.
    encoder
        The queue to its encoder.
    generator_name
        What metrics call its generator.
    streams
        The places of client streams, shared by all bundles.
    settings, metrics
        Of the server.
    """
    decoders = Decoders(catalogue.bundle)
    scale = backend.info.logit_scale
    # The encoder computes audits where it computes scores.
    run_audit = cast(RunAudit, backend.score)
    return {
        "FeatureService": FeatureServicer(encoder, catalogue, settings, metrics),
        "ModalityService": ModalityServicer(encoder, backend.score, catalogue, streams, settings, metrics),
        "BiasService": BiasServicer(
            encoder, run_audit, catalogue, decoders, scale, streams, settings, metrics
        ),
        "DefenseService": DefenseServicer(encoder, catalogue, decoders, scale, settings, metrics),
        "ImagingService": ImagingServicer(
            encoder,
            backend.generate,
            catalogue,
            decoders,
            settings,
            metrics,
            generator_name,
        ),
    }
