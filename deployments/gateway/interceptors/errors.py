"""The layer that turns an exception into a status with details."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from grpc import aio

from deployments.gateway.errors import STATUS_DETAILS_KEY, answer_for, describe, reason_of
from deployments.gateway.interceptors.chain import Call, Layer
from deployments.gateway.interceptors.requests import REQUEST_ID
from deployments.operations.metrics import Metrics


def errors_layer(metrics: Metrics, retry_after_s: float) -> Layer:
    """Return the layer that answers exceptions with statuses.

    Parameters
    ----------
    metrics
        Counts refusals by reason.
    retry_after_s
        Seconds that RetryInfo asks a refused caller to wait.
    """

    @asynccontextmanager
    async def around(call: Call) -> AsyncIterator[None]:
        try:
            yield
        except aio.AbortError:
            raise
        except (asyncio.CancelledError, GeneratorExit) as error:
            call.code = answer_for(asyncio.CancelledError()).code
            raise error
        except Exception as error:
            call.code, status = describe(error, retry_after_s, call.request_id)
            call.reason = reason_of(status)
            metrics.rejected.labels(call.reason).inc()
            # `abort` replaces the trailing metadata that was set before.
            trailing = ((STATUS_DETAILS_KEY, status.SerializeToString()), (REQUEST_ID, call.request_id))
            await call.context.abort(call.code, status.message, trailing)

    def layer(call: Call) -> AbstractAsyncContextManager[None]:
        return around(call)

    return layer
