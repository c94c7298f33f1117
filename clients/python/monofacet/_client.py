"""The synchronous client."""

from __future__ import annotations

from monofacet._sync.bias import BiasCalls
from monofacet._sync.defense import DefenseCalls
from monofacet._sync.features import FeatureCalls
from monofacet._sync.imaging import ImagingCalls
from monofacet._sync.modality import ModalityCalls
from monofacet._sync.models import ModelCalls

__all__ = ["Client"]


class Client(FeatureCalls, ModalityCalls, BiasCalls, DefenseCalls, ImagingCalls, ModelCalls):
    """Calls a Monofacet server. Safe to share between threads; use it as a context manager or `close` it.

    It can be pickled, for worker processes: there it connects by itself.

    Parameters
    ----------
    target
        ``host:port`` of the server.
    token
        Sent with each call, if the server asks for one, without the whitespace around it. Over plain text only to
        this machine, unless ``tls=False`` says that the network is private.
    tls
        True to encrypt with the system's certificates, a `TLS` for others. Default plain text.
    timeout
        A `Timeout`, or the seconds of a call with one answer. There is always a limit.
    retry
        When a call is tried again.
    bundle
        Name or id of the bundle that answers, on a server of several; `with_bundle` makes clients of the others.
        Default the server's own.
    max_in_flight
        Calls with one answer that this client makes at the same time; further ones wait here, within their
        timeouts. Default 64.
    channel
        A channel to use instead of making one, such as `monofacet.testing.MockChannel`. It is not closed.

    Raises
    ------
    InputError
        If the target, the token, the keys or the timeouts cannot be used.

    Examples
    --------
    >>> with Client("localhost:9000") as client:  # doctest: +SKIP
    ...     result = client.encode(["a red heart", pathlib.Path("heart.png")], dictionary="")
    ...     similarity = result.embeddings[0] @ result.embeddings[1]
    """
