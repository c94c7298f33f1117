"""OpenTelemetry: one span a call, below the caller's own where it sends a W3C `traceparent`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from deployments.gateway.interceptors.chain import Call, Layer

# Statuses that OpenTelemetry's conventions count as errors of a server.
_ERRORS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


def start_tracing(endpoint: str, bundle: str) -> tuple[Any, Callable[[], None]]:
    """Export spans to a collector.

    Parameters
    ----------
    endpoint
        OTLP over gRPC; `http://` is plain text, `https://` TLS.
    bundle
        Id of what is served, an attribute of every span.

    Returns
    -------
    The provider of tracers, and what flushes and stops it.
    """
    # Here: who traces nothing imports nothing.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "monofacet", "monofacet.bundle": bundle})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, provider.shutdown


def traces_layer(provider: Any) -> Layer:
    """Return the layer that records a span of every call.

    Parameters
    ----------
    provider
        An OpenTelemetry `TracerProvider`.
    """
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("monofacet.gateway")
    propagator = TraceContextTextMapPropagator()

    @asynccontextmanager
    async def around(call: Call) -> AsyncIterator[None]:
        carrier = {k: v for k, v in call.context.invocation_metadata() or () if isinstance(v, str)}
        service, _, method = call.method.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        with tracer.start_as_current_span(
            call.method,
            context=propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            # An exception's text may quote what the caller sent.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            finally:
                span.set_attribute("rpc.grpc.status_code", call.code.value[0])
                span.set_attribute("monofacet.request_id", call.request_id)
                if call.reason:
                    span.set_attribute("monofacet.reason", call.reason)
                if call.code in _ERRORS:
                    span.set_status(Status(StatusCode.ERROR, call.reason))

    return around


def encoder_spans(provider: Any, queue_s: float, inference_s: float) -> None:
    """Record where the time of the current span went, as two spans that end now.

    Parameters
    ----------
    provider
        As above; None records nothing.
    queue_s, inference_s
        Seconds waited, and seconds of decoding and forwards, as the encoder reports them.
    """
    if provider is None:
        return
    tracer = provider.get_tracer("monofacet.gateway")
    end = time.time_ns()
    middle = end - round(inference_s * 1e9)
    for name, start, stop in (
        ("encoder queue", middle - round(queue_s * 1e9), middle),
        ("encoder forward", middle, end),
    ):
        tracer.start_span(name, start_time=start).end(stop)
