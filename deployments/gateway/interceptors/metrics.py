"""The layer that observes every call: how many, how long, with which status."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.interceptors.chain import Call, Layer
from deployments.metrics import Metrics


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
            metrics.request_duration.labels(call.method, call.code.name).observe(
                time.perf_counter() - started
            )

    return around
