"""Health, reflection, metrics and draining of the gateway's server."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import model_service_pb2, model_service_pb2_grpc

from deployments.gateway.services import SERVICES
from tests.deployments.conftest import Open, error_details
from tests.support.waiting import PATIENCE_S

ENCODE = "monofacet.v1.FeatureService/Encode"
REQUEST = pb.EncodeRequest(inputs=[common.Input(text="a")])


async def test_health_is_answered_per_service(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        for name in ("", *SERVICES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="monofacet.v1.NoSuchService"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_every_service_and_itself(open_gateway: Open, version: str) -> None:
    name = f"grpc.reflection.{version}.ServerReflection"
    async with open_gateway() as gateway:
        # Without stubs: grpcio-reflection has none for v1.
        call = gateway.channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {service.name for service in (await call.read()).list_services_response.service}
        assert set(SERVICES) | {name, "grpc.health.v1.Health"} <= listed
        for service in listed:
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service))
            answer = await call.read()
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(text)
                for text in answer.file_descriptor_response.file_descriptor_proto
            ]
            assert service in {f"{file.package}.{s.name}" for file in files for s in file.service}
            # What a client makes of them is whole: every type that a method names is in a file that came along.
            pool, wanted = descriptor_pool.DescriptorPool(), {file.name: file for file in files}
            while wanted:
                # Those whose imports are there already; were one missing, nothing would ever be.
                ready = [n for n, file in wanted.items() if not wanted.keys() & set(file.dependency)]
                for file_name in ready:
                    pool.Add(wanted.pop(file_name))
                assert ready
            assert pool.FindServiceByName(service).methods
        call.cancel()


async def not_serving(health: Any, service: str = "") -> None:
    """Wait until the server says that it drains."""
    while True:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            return
        await asyncio.sleep(0.005)


async def test_draining_says_so_finishes_what_runs_and_refuses_the_rest(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        gateway.model.hold()
        running = asyncio.ensure_future(gateway.features.Encode(REQUEST))
        await asyncio.to_thread(gateway.model.entered.acquire)
        draining = asyncio.ensure_future(gateway.server.drain())
        await not_serving(health, SERVICES[0])
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(REQUEST)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_details(caught.value) == ("DRAINING", [], 0.25)
        gateway.model.release()
        assert (await running).norms
        assert await draining


async def test_what_cannot_be_taken_is_refused_before_its_request_is_read(open_gateway: Open) -> None:
    async with open_gateway(max_concurrent_calls=1) as gateway:

        async def reason() -> str:
            call = gateway.channel.stream_stream(f"/{ENCODE}")(timeout=PATIENCE_S)
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
            return error_details(caught.value)[0]

        gateway.model.hold()
        running = asyncio.ensure_future(gateway.features.Encode(REQUEST))
        await asyncio.to_thread(gateway.model.entered.acquire)
        reasons = [await reason()]
        draining = asyncio.ensure_future(gateway.server.drain())
        await not_serving(health_pb2_grpc.HealthStub(gateway.channel))
        reasons.append(await reason())
        gateway.model.release()
        assert (await running).norms
        assert await draining
    assert reasons == ["TOO_MANY_CALLS", "DRAINING"]


async def test_with_a_health_port_draining_closes_the_other_port_at_once(open_gateway: Open) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with (
        open_gateway(health_port=port) as gateway,
        aio.insecure_channel(f"127.0.0.1:{port}") as health_channel,
    ):
        health = health_pb2_grpc.HealthStub(health_channel)
        gateway.model.hold()
        running = asyncio.ensure_future(gateway.features.Encode(REQUEST))
        await asyncio.to_thread(gateway.model.entered.acquire)
        draining = asyncio.ensure_future(gateway.server.drain())
        await not_serving(health)
        # A new call finds no server, so a client with other addresses takes another one.
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(REQUEST)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not caught.value.trailing_metadata()
        gateway.model.release()
        assert (await running).norms
        assert await draining


async def test_a_call_that_was_on_its_way_when_the_server_was_told_to_stop_is_answered(
    open_gateway: Open,
) -> None:
    async with open_gateway(linger_s=PATIENCE_S) as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        draining = asyncio.ensure_future(gateway.server.drain())
        await not_serving(health)
        assert (await gateway.features.Encode(REQUEST)).norms
        draining.cancel()


async def test_a_call_that_outlasts_the_drain_is_cut_off(open_gateway: Open) -> None:
    async with open_gateway(drain_s=0.1) as gateway:
        gateway.model.hold()
        running = asyncio.ensure_future(gateway.features.Encode(REQUEST))
        await asyncio.to_thread(gateway.model.entered.acquire)
        assert not await gateway.server.drain()
        with pytest.raises(aio.AioRpcError):
            await running


async def test_every_metric_is_served_on_one_port(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        await gateway.features.Encode(REQUEST)
        with pytest.raises(aio.AioRpcError):
            await gateway.features.Encode(pb.EncodeRequest())
        port = gateway.server.metrics_port
        page = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        )
        bundle = gateway.server.bundle_id
    for line in (
        f'monofacet_request_duration_seconds_count{{bundle="{bundle}",code="OK",method="{ENCODE}"}} 1.0',
        f'monofacet_request_duration_seconds_count{{bundle="",code="INVALID_ARGUMENT",method="{ENCODE}"}} 1.0',
        f'monofacet_requests_in_flight{{method="{ENCODE}"}} 0.0',
        f'monofacet_items_total{{method="{ENCODE}"}} 1.0',
        'monofacet_queue_duration_seconds_count{deployment="encoder"} 1.0',
        'monofacet_inference_duration_seconds_count{backend="debug",deployment="encoder"} 1.0',
        'monofacet_batch_size_sum{deployment="encoder"} 1.0',
        'monofacet_rejected_total{reason="INVALID_INPUT"} 1.0',
        f'monofacet_model_info{{bundle="{bundle}",device="cpu"',
    ):
        assert line in page


async def test_calls_that_come_while_nobody_looks_are_all_answered_with_a_reason(open_gateway: Open) -> None:
    """gRPC by itself drops the calls beyond a thousand that wait to be looked at, with a bare CANCELLED."""
    # A connection of its own for each; on one, calls beyond `max_connection_calls` would not be opened.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with open_gateway() as gateway:
        target = f"127.0.0.1:{gateway.port}"
        with ExitStack() as stack:
            flood = []
            for _ in range(5):
                channel = stack.enter_context(grpc.insecure_channel(target, options))
                stub: Any = model_service_pb2_grpc.ModelServiceStub(channel)
                flood += [stub.ListModels.future(model_service_pb2.ListModelsRequest()) for _ in range(500)]
            # As when a forward has all cores: the server's loop does not run, and calls arrive.
            time.sleep(1.0)
            codes = Counter(await asyncio.to_thread(lambda: [call.code() for call in flood]))
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes.total() == 2_500
