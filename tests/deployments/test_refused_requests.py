"""What was refused is not held: gRPC keeps the error of an aborted call, and with it all that the error can reach."""

from __future__ import annotations

import gc

import grpc
import pytest
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb

from deployments.gateway.interceptors.chain import Call
from deployments.gateway.interceptors.reading import Received
from tests.deployments.conftest import Open

MIB = 1024 * 1024


@pytest.mark.parametrize(
    "request_",
    [
        pb.EncodeRequest(inputs=[common.Input(image=common.Image(data=bytes(17 * MIB)))]),
        pb.EncodeRequest(inputs=[common.Input(text="a")], options=pb.EncodeOptions(dictionary="no-such")),
    ],
    ids=["by the contract's rules", "by the servicer"],
)
async def test_a_refused_request_is_let_go(open_gateway: Open, request_: pb.EncodeRequest) -> None:
    # What other tests of this process have left is not this gateway's.
    gc.collect()
    others = {id(one): one for one in gc.get_objects() if isinstance(one, Call | Received)}
    async with open_gateway() as gateway:
        gc.disable()
        try:
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    await gateway.features.Encode(request_)
            alive = [one for one in gc.get_objects() if id(one) not in others]
        finally:
            gc.enable()
        # What still waits for the garbage collector is small.
        assert all(call.request is None for call in alive if isinstance(call, Call))
        assert all(received.message is None for received in alive if isinstance(received, Received))
