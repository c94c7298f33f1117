"""Test code that uses Monofacet without a server.

`mock_client` and `mock_async_client` are clients of a `FakeMonofacet`, a small deterministic model, over
channels that open no socket; requests and answers are serialised as on the wire.

>>> from monofacet.testing import mock_client
>>> client, channel = mock_client()
>>> client.encode(["a red heart"]).embeddings.shape
(1, 8)
>>> [method for method, request in channel.calls]
['/monofacet.v1.FeatureService/Encode']

`MockChannel.fail` makes the next call fail, and overriding a method of `FakeMonofacet` changes what it
answers. `run_server` serves one on a real loopback port.
"""

from monofacet.testing._channel import MockAioChannel, MockChannel
from monofacet.testing._clients import mock_async_client, mock_client, run_server
from monofacet.testing._fake import FakeMonofacet
from monofacet.testing._status import status_with_details

__all__ = [
    "FakeMonofacet",
    "MockAioChannel",
    "MockChannel",
    "mock_async_client",
    "mock_client",
    "run_server",
    "status_with_details",
]
