"""Which layers are around which calls, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deployments.access.scopes import methods_of
from deployments.gateway.interceptors.access import Access, TokenLimits
from deployments.gateway.interceptors.chain import Chain, Group, Layer
from deployments.gateway.interceptors.deadlines import deadlines_layer
from deployments.gateway.interceptors.errors import errors_layer
from deployments.gateway.interceptors.metrics import metrics_layer
from deployments.gateway.interceptors.reading import Requests, checked_deserializer
from deployments.gateway.interceptors.requests import requests_layer
from deployments.gateway.interceptors.traces import traces_layer
from deployments.gateway.interceptors.validation import validation_layer
from deployments.gateway.services import DESCRIPTORS
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings

# Bytes of a request to health or reflection, which name one thing.
SMALL_BYTES = 4096


def gateway_chain(
    settings: Settings,
    metrics: Metrics,
    traces: Any,
    access: Access,
    admission: Sequence[Layer],
    requests: Requests,
    health_requests: Requests,
) -> Chain:
    """Return what is around every call of the gateway.

    Parameters
    ----------
    settings, metrics
        Of the server.
    traces
        An OpenTelemetry `TracerProvider`; None traces nothing.
    access
        Says who calls, and whether they may.
    admission
        Layers that refuse calls unread when the server is full, starting or stopping.
    requests, health_requests
        Read the requests, those to health apart from all others.
    """
    observers = [
        metrics_layer(metrics),
        requests_layer,
        *([traces_layer(traces)] if traces is not None else []),
        errors_layer(metrics, settings.retry_after_s),
    ]
    token_limits = TokenLimits(settings.token_calls, settings.token_rate)
    ours = Group(
        [
            *observers,
            access.layer,
            token_limits.layer,
            *admission,
            deadlines_layer(settings.default_deadline_s, settings.max_call_s),
            requests.layer,
            validation_layer,
        ],
        lambda decode: checked_deserializer(decode, settings.max_request_bytes),
    )
    # Around health neither tokens nor lines of the log, since probers ask every few seconds.
    health = Group([errors_layer(metrics, settings.retry_after_s), health_requests.layer], _small)
    return Chain(
        {
            "monofacet.": ours,
            "grpc.reflection.": Group([*observers, access.layer, requests.layer], _small),
            "grpc.health.": health,
        },
        [name for service in DESCRIPTORS for name in methods_of(service)],
        settings.untaken_s,
    )


def _small(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    return checked_deserializer(decode, SMALL_BYTES)
