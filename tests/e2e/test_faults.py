"""A hung encoder and one that has lost its bundle: told by health and metrics, replaced, and their calls answered."""

from __future__ import annotations

import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from services.bundle.load import Bundle
from tests.support.service import Service, descendants, start_service
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(900)
# Seconds within which anything that must happen happens, on a busy machine too.
BOUND_S = 240.0
REQUEST = pb.EncodeRequest(inputs=[common.Input(text="a red heart")])


@pytest.fixture(scope="module")
def service(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    folder = tmp_path_factory.mktemp("faults")
    bundle = Path(shutil.copytree(tiny.path, folder / "bundle"))
    environment = {"MONOFACET_TUNE": "false", "MONOFACET_BACKEND": "torch", "MONOFACET_THREADS": "1"}
    started = start_service(bundle, folder / "log", environment=environment)
    yield started, bundle
    assert started.stop() == 0


def encoder_of(service: Service) -> int:
    for pid in descendants(service.process.pid):
        with suppress(OSError):
            if b"ServeReplica:monofacet:encoder" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise LookupError("no encoder")


def metric(service: Service, name: str, **labels: str) -> float:
    page = urllib.request.urlopen(service.metrics_url).read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def status(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status


NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING


def test_a_hung_encoder_is_told_of_and_replaced_and_its_calls_are_answered(
    service: tuple[Service, Path],
) -> None:
    server, _ = service
    with grpc.insecure_channel(server.target) as channel, ThreadPoolExecutor(4) as callers:
        encode = feature_service_pb2_grpc.FeatureServiceStub(channel).Encode
        encode(REQUEST, timeout=60)
        stopped = encoder_of(server)
        os.kill(stopped, signal.SIGSTOP)
        patient = [callers.submit(encode, REQUEST, timeout=BOUND_S) for _ in range(2)]
        # One that cannot wait ends within its own time, in the gateway's queue or at the replica.
        with pytest.raises(grpc.RpcError) as caught:
            encode(REQUEST, timeout=3)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        eventually(lambda: status(channel) == NOT_SERVING, patience_s=BOUND_S)
        assert metric(server, "monofacet_stalled_seconds", deployment="encoder") > 5
        assert metric(server, "monofacet_replicas_hung", deployment="encoder") == 1
        assert [len(call.result().norms) for call in patient] == [1, 1]
        eventually(lambda: status(channel) == SERVING, patience_s=BOUND_S)
        # On an idle machine the next one serves before Ray has buried this one.
        eventually(lambda: stopped not in descendants(server.process.pid), patience_s=BOUND_S)
        assert encoder_of(server) != stopped
        # Stopped as it was, it is gone.
        eventually(lambda: not Path(f"/proc/{stopped}").exists(), patience_s=BOUND_S)
        assert metric(server, "monofacet_replica_restarts_total", deployment="encoder") >= 1
        assert metric(server, "monofacet_stalled_seconds", deployment="encoder") == 0


def test_an_encoder_whose_bundle_is_gone_says_so_and_is_back_with_it(service: tuple[Service, Path]) -> None:
    server, bundle = service
    with grpc.insecure_channel(server.target) as channel:
        encode = feature_service_pb2_grpc.FeatureServiceStub(channel).Encode
        away = bundle.with_name("away")
        bundle.rename(away)
        os.kill(encoder_of(server), signal.SIGKILL)
        eventually(
            lambda: metric(server, "monofacet_replicas_faulty", deployment="encoder") == 1, patience_s=BOUND_S
        )
        eventually(lambda: status(channel) == NOT_SERVING, patience_s=BOUND_S)
        assert "BundleFileError: bundle: no manifest.json to read" in server.log.read_text()
        with pytest.raises(grpc.RpcError) as caught:
            encode(REQUEST, timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        away.rename(bundle)
        eventually(lambda: status(channel) == SERVING, patience_s=BOUND_S)
        encode(REQUEST, timeout=60)
        eventually(
            lambda: metric(server, "monofacet_replicas_faulty", deployment="encoder") == 0, patience_s=BOUND_S
        )
