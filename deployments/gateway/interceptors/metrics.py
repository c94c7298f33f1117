"""The layer that observes every call: how many, how long, with which status."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.interceptors.chain import Call, Layer
from deployments.operations.metrics import Metrics

# OpenMetrics allows 128 characters of names and values together.
_EXEMPLAR_LENGTH = 128 - len("request_id")


def metrics_layer(metrics: Metrics) -> Layer:
    """Return the layer; it must be the outermost, to see the status that the others chose."""

    @asynccontextmanager
    async def around(call: Call) -> AsyncIterator[None]:
        in_flight = metrics.requests_in_flight.labels(call.method)
        in_flight.inc()
        started = time.perf_counter()
        try:
            yield
        finally:
            in_flight.dec()
            # Shown to a scraper that asks for OpenMetrics: from a slow bucket to the call's line in the log.
            exemplar = (
                {"request_id": call.request_id} if 0 < len(call.request_id) <= _EXEMPLAR_LENGTH else None
            )
            metrics.request_duration.labels(call.method, call.code.name, call.bundle).observe(
                time.perf_counter() - started, exemplar
            )

    return around
