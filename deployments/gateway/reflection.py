"""Server reflection, by which clients without the contract's files find what there is to call: v1 and v1alpha."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

# grpcio-reflection has the older one alone. The messages of both are the same on the wire.
V1ALPHA = reflection.SERVICE_NAME
V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(services: Iterable[str], server: Any) -> None:
    """Let `server` answer reflection about `services` and about reflection itself.

    Parameters
    ----------
    services
        Full names of services whose files are in the default pool.
    server
        A `grpc.aio` server.
    """
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, V1ALPHA, V1))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": handler}),)
    )


def _describe_v1() -> None:
    """Put the file of v1 into the default pool: that of v1alpha under another package."""
    renamed = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(renamed)
    renamed.name = "grpc/reflection/v1/reflection.proto"
    renamed.package = "grpc.reflection.v1"
    renamed.ClearField("options")
    for message in renamed.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for method in renamed.service[0].method:
        method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
        method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(renamed.name)
    except KeyError:
        pool.AddSerializedFile(renamed.SerializeToString())
