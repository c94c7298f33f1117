"""SIGTERM: what is in flight is finished, nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from services.bundle import Bundle
from tests.support.service import STOP_TIMEOUT_S, start_service

pytestmark = pytest.mark.timeout(600)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:1]


def test_a_stream_in_flight_is_finished_and_no_process_stays(tiny: Bundle, tmp_path: Path) -> None:
    service = start_service(tiny.path, tmp_path / "log")
    below = service.descendants()
    going = threading.Event()

    def requests() -> Iterator[pb.StreamEncodeRequest]:
        for n in range(200):
            if n == 100:
                # The rest is sent only once the service has been told to stop.
                going.wait(60)
            yield pb.StreamEncodeRequest(item=pb.StreamItem(id=str(n), input=common.Input(text=f"text {n}")))

    with grpc.insecure_channel(service.target) as channel:
        answers = feature_service_pb2_grpc.FeatureServiceStub(channel).StreamEncode(requests(), timeout=120)
        received = [next(answers)]
        service.process.send_signal(signal.SIGTERM)
        going.set()
        received += answers
    assert [answer.id for answer in received] == [str(n) for n in range(200)]
    assert service.process.wait(STOP_TIMEOUT_S) == 0
    assert "monofacet: stopped" in service.log.read_text()
    assert [pid for pid in below if alive(pid)] == []


def test_a_bundle_that_cannot_be_served_is_one_line_and_exit_code_1(tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        start_service(tmp_path, tmp_path / "log")
    assert "manifest.json" in str(caught.value)
    assert "Traceback" not in str(caught.value)
