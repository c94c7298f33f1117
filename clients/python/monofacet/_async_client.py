"""The asyncio client."""

from __future__ import annotations

from monofacet._async.bias import BiasCalls
from monofacet._async.defense import DefenseCalls
from monofacet._async.features import FeatureCalls
from monofacet._async.imaging import ImagingCalls
from monofacet._async.modality import ModalityCalls
from monofacet._async.models import ModelCalls

__all__ = ["AsyncClient"]


class AsyncClient(FeatureCalls, ModalityCalls, BiasCalls, DefenseCalls, ImagingCalls, ModelCalls):
    """Calls a Monofacet server from asyncio; the calls and their parameters are those of `Client`.

    Use it as an asynchronous context manager, or `close` it. Each event loop that it is used in gets a connection of
    its own.

    Parameters
    ----------
    target, token, tls, timeout, retry, bundle, max_in_flight
        As for `Client`.
    channel
        A `grpc.aio.Channel` to use instead of making one, such as `monofacet.testing.MockAioChannel`. It is
        not closed.

    Examples
    --------
    >>> async with AsyncClient("localhost:9000") as client:  # doctest: +SKIP
    ...     result = await client.encode(["a red heart"])
    """
