"""The layer that ends a call at its deadline, and gives unary calls one when they have none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.gateway.interceptors.chain import Call, Layer


def deadlines_layer(default_s: float, longest_s: float = 0.0) -> Layer:
    """Return the layer that ends calls at their deadlines.

    Parameters
    ----------
    default_s
        Seconds for a unary call whose caller set no deadline. A stream without one may last: StreamEncode costs
        only its window, and what client streams keep is bounded by `ClientStreams`.
    longest_s
        Seconds that no call may pass, whatever its caller allows; 0 for no such limit.
    """

    @asynccontextmanager
    async def around(call: Call) -> AsyncIterator[None]:
        remaining = call.context.time_remaining()
        if remaining is None and not call.streaming:
            remaining = default_s
        if longest_s:
            remaining = longest_s if remaining is None else min(remaining, longest_s)
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        async with asyncio.timeout(remaining):
            yield

    return around
