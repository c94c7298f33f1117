"""Which scope each method asks for; the one table."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum

from google.protobuf.descriptor import ServiceDescriptor


class Scope(StrEnum):
    """What a token may do.

    READ reads the bundle and runs a tower over inputs; GENERATE makes images, which costs thousands of times
    as much; ADMIN is for the operator and includes both.
    """

    READ = "read"
    GENERATE = "generate"
    ADMIN = "admin"


_V1 = "monofacet.v1."

# Full method name without the leading slash. A method without a row stops the start: a new method must be
# given a scope on purpose.
SCOPES: dict[str, Scope] = {
    _V1 + "FeatureService/Encode": Scope.READ,
    _V1 + "FeatureService/StreamEncode": Scope.READ,
    _V1 + "ModalityService/ListFeatures": Scope.READ,
    _V1 + "ModalityService/GetFeature": Scope.READ,
    _V1 + "ModalityService/ClassifyModality": Scope.READ,
    _V1 + "ModalityService/ScoreModality": Scope.READ,
    _V1 + "BiasService/ClassifyGender": Scope.READ,
    _V1 + "BiasService/AuditGender": Scope.READ,
    _V1 + "DefenseService/FilterAdversarial": Scope.READ,
    _V1 + "ImagingService/PreviewSteering": Scope.READ,
    _V1 + "ImagingService/ListAttributes": Scope.READ,
    _V1 + "ImagingService/GetAttribute": Scope.READ,
    _V1 + "ImagingService/Generate": Scope.GENERATE,
    _V1 + "ModelService/GetModel": Scope.READ,
    _V1 + "ModelService/ListModels": Scope.READ,
    # Reflection lists everything that there is to try.
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Scope.ADMIN,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.ADMIN,
}


class MethodWithoutScope(Exception):
    """A method is served that the table does not know."""


def allows(scopes: Collection[Scope], needed: Scope) -> bool:
    """Return whether a holder of `scopes` may call a method that asks for `needed`."""
    return needed in scopes or Scope.ADMIN in scopes


def methods_of(service: ServiceDescriptor) -> list[str]:
    """Return the full names of a service's methods, as the table writes them."""
    return [f"{service.full_name}/{method.name}" for method in service.methods]


def check_scopes(services: Iterable[ServiceDescriptor]) -> None:
    """Raise MethodWithoutScope unless every method of `services` has a row."""
    missing = [name for service in services for name in methods_of(service) if name not in SCOPES]
    if missing:
        raise MethodWithoutScope(f"no scope for {', '.join(missing)}")
