"""Before the models are warm and while they are gone; what is logged and traced of each call."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.openmetrics.exposition import generate_latest

from deployments.access.scopes import Scope
from deployments.access.tokens import new_token
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.interceptors.chain import Call
from deployments.gateway.interceptors.requests import peer_of
from deployments.gateway.server import GatewayServer
from deployments.gateway.services import SERVICES
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from tests.deployments.conftest import Open, error_details
from tests.deployments.debug import DebugModel

REQUEST = pb.EncodeRequest(inputs=[common.Input(text="a")])
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_before_the_models_are_warm_the_port_answers_not_serving_and_when_to_come_back(
    tiny: Bundle,
) -> None:
    server = GatewayServer(Settings(port=0, metrics_port=0, retry_after_s=0.25), Catalogue.read(tiny))
    port, _ = await server.open()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        features: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)

        async def states() -> set[Any]:
            names = ("", *SERVICES)
            answers = [await health.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
            return {answer.status for answer in answers}

        assert await states() == {NOT_SERVING}
        for call in (features.Encode(REQUEST), features.StreamEncode(iter([])).read()):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert error_details(caught.value) == ("MODEL_STARTING", [], 0.25)

        async def unused(*_: Any) -> Any:
            raise AssertionError("no work was sent")

        await server.serve(unused, unused, DebugModel().info())
        assert await states() == {SERVING}
        # The encoder dies and comes back.
        await server.set_serving(False)
        assert await states() == {NOT_SERVING}
        await server.set_serving(True)
        assert await states() == {SERVING}
        value = server.metrics.registry.get_sample_value("monofacet_serving", {"service": SERVICES[0]})
        assert value == 1
        await server.drain()
        await server.set_serving(True)
    value = server.metrics.registry.get_sample_value("monofacet_serving", {"service": SERVICES[0]})
    assert value == 0


async def test_tokens_are_asked_for_before_the_models_are_warm(tiny: Bundle) -> None:
    _, line = new_token("a", frozenset([Scope.READ]), None)
    server = GatewayServer(Settings(port=0, metrics_port=0, tokens=line), Catalogue.read(tiny))
    port, _ = await server.open()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        features: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await features.Encode(REQUEST)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await server.drain()


async def trailing_id(call: Any) -> Any:
    return dict(await call.trailing_metadata())["x-request-id"]


async def test_a_sane_request_id_is_kept_and_any_other_replaced(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        for given, kept in (("trace/7-a", True), ("a b{c}", False), ("x" * 200, False)):
            call = gateway.features.Encode(REQUEST, metadata=(("x-request-id", given),))
            assert (await trailing_id(call) == given) is kept
        bad = gateway.features.Encode(pb.EncodeRequest(), metadata=(("x-request-id", "seven"),))
        assert await trailing_id(bad) == "seven"


async def test_a_call_is_logged_with_its_holder_and_without_payload_or_token(open_gateway: Open) -> None:
    token, line = new_token("alice", frozenset([Scope.READ]), None)
    headers = (("authorization", f"Bearer {token}"), ("x-request-id", "seven"))
    requests = [
        pb.EncodeRequest(inputs=[common.Input(text="the secret of the caller")]),
        pb.EncodeRequest(inputs=[common.Input(image=common.Image(data=b"bad"))]),
        pb.EncodeRequest(inputs=[common.Input(text="the secret of the caller " * 10)]),
    ]
    with structlog.testing.capture_logs() as logged:
        async with open_gateway(tokens=line) as gateway:
            bundle_id = gateway.server.bundle_id
            for request in requests:
                call = gateway.features.Encode(request, metadata=headers)
                await call.code()
    calls = [entry for entry in logged if entry["event"] == "call"]
    assert [entry["code"] for entry in calls] == ["OK", "INVALID_ARGUMENT", "INVALID_ARGUMENT"]
    assert [entry.get("reason") for entry in calls] == [None, "IMAGE_CORRUPT", "TEXT_TOO_LONG"]
    assert {(entry["token"], entry["request_id"]) for entry in calls} == {("alice", "seven")}
    # Of the address and no port, and of the bundle: the id that the answers carry.
    assert {entry["peer"] for entry in calls} == {"127.0.0.1"}
    assert {entry.get("bundle") for entry in calls} == {bundle_id}
    assert {entry["method"] for entry in calls} == {"monofacet.v1.FeatureService/Encode"}
    assert "secret" not in repr(logged)
    assert token not in repr(logged)


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        ("ipv4:10.0.0.7:51234", "10.0.0.7"),
        ("ipv6:%5B2001:db8::1%5D:51234", "2001:db8::1"),
        ("ipv6:[::1]:51234", "::1"),
        ("unix:/tmp/s", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_a_peer_is_told_by_its_address(peer: str, told: str) -> None:
    context = SimpleNamespace(peer=lambda: peer)
    assert peer_of(Call("a/B", context, None, False, False)) == told


async def test_calls_are_measured_by_bundle_and_lead_to_their_line_in_the_log(open_gateway: Open) -> None:
    name = "monofacet_request_duration_seconds_count"
    method = "monofacet.v1.FeatureService/Encode"
    async with open_gateway() as gateway:
        await gateway.features.Encode(REQUEST, metadata=(("x-request-id", "seven"),))
        # Its exemplar would be longer than OpenMetrics allows.
        await gateway.features.Encode(REQUEST, metadata=(("x-request-id", "x" * 128),))
        unknown = pb.EncodeRequest(inputs=REQUEST.inputs, bundle="nobody")
        assert await gateway.features.Encode(unknown).code() is grpc.StatusCode.NOT_FOUND
        assert gateway.sample(name, method=method, code="OK", bundle=gateway.server.bundle_id) == 2
        assert gateway.sample(name, method=method, code="NOT_FOUND", bundle="") == 1
        page = generate_latest(gateway.server.metrics.registry).decode()
    exemplars = [line.partition(" # ")[2] for line in page.splitlines() if " # " in line]
    assert any(line.startswith('{request_id="seven"}') for line in exemplars)
    assert "x" * 128 not in page


async def test_limits_are_shown_beside_their_use(open_gateway: Open) -> None:
    async with open_gateway(max_concurrent_calls=7, max_queued_items=9) as gateway:

        def shown(limit: str, deployment: str = "") -> tuple[float, float]:
            labels = {"limit": limit, "deployment": deployment}
            return gateway.sample("monofacet_limit", **labels), gateway.sample(
                "monofacet_limit_used", **labels
            )

        assert shown("max_concurrent_calls") == (7, 0)
        gateway.model.hold()
        call = gateway.features.Encode(REQUEST)
        assert await asyncio.to_thread(gateway.model.entered.acquire, timeout=60)
        assert shown("max_concurrent_calls") == (7, 1)
        assert shown("max_queued_items", "encoder") == (9, 1)
        gateway.model.release()
        await call
        assert shown("max_queued_items", "encoder") == (9, 0)
        assert shown("max_client_streams") == (4, 0)


LOGGING = """
import logging, structlog, time
from deployments.operations import logs
logs.configure({form!r}, "info", "gateway")
structlog.stdlib.get_logger("monofacet.calls").info("call", code="OK", text="ä\\n{{}}")
logging.getLogger("monofacet.gateway").warning("cut off after %d s", 3)
logging.getLogger("monofacet").debug("too little to tell")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("monofacet").exception("broken")
time.sleep(0.3)
"""


@pytest.mark.parametrize("form", ["json", "console"])
def test_every_line_of_the_log_has_the_form_that_was_asked_for(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGING.format(form=form)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    assert "too little" not in done.stderr
    if form == "console":
        assert "cut off after 3 s" in done.stderr and not done.stderr.lstrip().startswith("{")
        return
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["call", "cut off after 3 s", "broken"]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert {line["process"] for line in lines} == {"gateway"}
    assert lines[0]["text"] == "ä\n{}"
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_lines_of_the_replicas_reach_the_commands_standard_error(tmp_path: Path) -> None:
    script = (
        "import pathlib, subprocess, sys\n"
        "from deployments.operations.logs import Collector\n"
        f"with Collector(pathlib.Path({str(tmp_path)!r})):\n"
        f"    subprocess.run([sys.executable, '-c', {LOGGING.format(form='json')!r}], check=True,"
        " stderr=subprocess.DEVNULL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()][:2] == [
        "call",
        "cut off after 3 s",
    ]


class Spans(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector that keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[str, Spans]]:
    spans = Spans()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(spans, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(None)


async def test_a_call_is_a_span_below_its_callers(open_gateway: Open, collector: tuple[str, Spans]) -> None:
    endpoint, spans = collector
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with open_gateway(otlp_endpoint=endpoint) as gateway:
        metadata = (("traceparent", f"00-{trace}-{parent}-01"), ("x-request-id", "seven"))
        await gateway.features.Encode(REQUEST, metadata=metadata)
        with pytest.raises(aio.AioRpcError):
            await gateway.features.Encode(pb.EncodeRequest(), metadata=metadata)
    calls = [span for span in spans.spans if span.name == "monofacet.v1.FeatureService/Encode"]
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in calls} == {(trace, parent)}
    codes = [
        attribute.value.int_value
        for span in calls
        for attribute in span.attributes
        if attribute.key == "rpc.grpc.status_code"
    ]
    assert codes == [0, 3]
    parts = {span.name: span for span in spans.spans if span.parent_span_id == calls[0].span_id}
    assert set(parts) == {"encoder queue", "encoder forward"}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in parts.values())
