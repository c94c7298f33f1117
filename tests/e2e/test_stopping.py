"""Starting and stopping: what is in flight is finished, and nothing is left behind whatever dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import monofacet
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from deployments.access.scopes import Scope
from deployments.access.tokens import new_token
from services.bundle.load import Bundle
from tests.support.certificates import Authority
from tests.support.service import START_TIMEOUT_S, STOP_TIMEOUT_S, Service, start_service
from tests.support.waiting import PATIENCE_S


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def red_circle(service: Service) -> bytes:
    with monofacet.Client(service.target, timeout=240) as client:
        (image,) = client.generate(
            "red circle", seeds=5, edits=[monofacet.SteeringEdit("image", quantile=0.8)]
        ).images
    return image.data


def left(pids: set[int], grace_s: float = PATIENCE_S) -> list[int]:
    """Return which of the processes still live after some seconds; one that is being ended is not left behind."""
    deadline = time.monotonic() + grace_s
    while (living := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return living


def test_another_start_makes_the_same_image_and_its_end_finishes_a_stream_in_flight_and_leaves_no_process(
    running_service: Service, served: Bundle, tmp_path: Path
) -> None:
    """One start for both."""
    service = start_service(served.path, tmp_path / "log")
    assert red_circle(service) == red_circle(running_service)
    below = service.descendants()
    going = threading.Event()

    def requests() -> Iterator[pb.StreamEncodeRequest]:
        for n in range(200):
            if n == 100:
                # The rest is sent only once the service has been told to stop.
                going.wait(PATIENCE_S)
            yield pb.StreamEncodeRequest(item=pb.StreamItem(id=str(n), input=common.Input(text=f"text {n}")))

    with grpc.insecure_channel(service.target) as channel:
        answers = feature_service_pb2_grpc.FeatureServiceStub(channel).StreamEncode(
            requests(), timeout=PATIENCE_S
        )
        received = [next(answers)]
        service.process.send_signal(signal.SIGTERM)
        going.set()
        received += answers
    assert [answer.id for answer in received] == [str(n) for n in range(200)]
    assert service.process.wait(STOP_TIMEOUT_S) == 0
    assert "monofacet: stopped" in service.log.read_text()
    assert left(below) == []


def test_a_bundle_that_cannot_be_served_is_one_line_and_exit_code_1(tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        start_service(tmp_path, tmp_path / "log")
    assert "manifest.json" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def encoder_of(service: Service) -> int:
    return next(
        pid for pid in service.descendants() if "monofacet:encoder" in " ".join(psutil.Process(pid).cmdline())
    )


def test_a_guarded_service_survives_the_death_of_its_encoder_and_then_drains(
    tiny: Bundle, tmp_path: Path
) -> None:
    """One start for several of its traits: TLS, tokens, a killed replica, JSON logs, SIGTERM with calls in flight."""
    authority = Authority()
    certificate, key = authority.issue()
    (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    token, line = new_token("tester", frozenset([Scope.READ]), None)
    (tmp_path / "tokens").write_text(line)
    service = start_service(
        tiny.path,
        tmp_path / "log",
        ["--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "tls.key")]
        + ["--tokens-file", str(tmp_path / "tokens"), "--host", "127.0.0.1"],
    )
    below = service.descendants()
    target = f"localhost:{service.target.rpartition(':')[2]}"
    tls = monofacet.TLS(authority.pem)
    with monofacet.Client(target, token=token, tls=tls, timeout=240) as client:
        with monofacet.Client(target, tls=tls) as stranger, pytest.raises(monofacet.AuthenticationError):
            stranger.encode("a")
        client.encode("before")
        stop = threading.Event()
        answered, late = [], []

        def caller() -> None:
            while not stop.is_set():
                client.encode("a secret text")
                answered.append(time.monotonic())

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(caller) for _ in range(4)]
            time.sleep(1)
            os.kill(encoder_of(service), signal.SIGKILL)
            killed = time.monotonic()
            while not late and time.monotonic() < killed + START_TIMEOUT_S:
                time.sleep(0.1)
                late = [moment for moment in answered if moment > killed + 1]
            stop.set()
            # An exception of any call would be raised here: none failed.
            for done in callers:
                done.result()
            assert late
            sending = threading.Barrier(5)

            def last(n: int) -> monofacet.EncodeResult:
                sending.wait(PATIENCE_S)
                return client.encode([f"text {n}"] * 50)

            flying = [pool.submit(last, n) for n in range(4)]
            sending.wait(PATIENCE_S)
            time.sleep(0.3)
            service.process.send_signal(signal.SIGTERM)
            for done in flying:
                assert len(done.result()) == 50
    assert service.process.wait(STOP_TIMEOUT_S) == 0
    assert left(below) == []
    log = service.log.read_text()
    calls = [json.loads(entry) for entry in log.splitlines() if entry.startswith("{")]
    assert {"TOKEN_MISSING"} <= {entry.get("reason") for entry in calls}
    assert {entry["token"] for entry in calls if entry.get("code") == "OK"} == {"tester"}
    assert "secret" not in log and token not in log


def test_a_model_that_cannot_be_warmed_leaves_the_port_open_and_says_why(
    tiny: Bundle, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        # OpenVINO has no f16 on a CPU, which is found when the towers are loaded.
        "MONOFACET_BACKEND": "openvino",
        "MONOFACET_PRECISION": "f16",
    }
    until = re.compile("monofacet: not serving: .+")
    service = start_service(tiny.path, tmp_path / "log", ["--port", str(port)], environment, until)
    try:
        assert "not serving: encoder: " in service.log.read_text()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                feature_service_pb2_grpc.FeatureServiceStub(channel).Encode(pb.EncodeRequest(), timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        assert service.stop() == 0


def folder_of(service: Service) -> Path:
    """Return the temporary folder of a running service; other servers of this machine have theirs."""
    for pid in service.descendants():
        if found := re.search(r"--temp-dir=(\S+)", " ".join(psutil.Process(pid).cmdline())):
            return Path(found[1])
    raise AssertionError("no folder")


# Asks Ray what it knows, as whoever wants to submit work has to.
STRANGER = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=None, timeout=60)), "keys")
"""


def test_no_environment_matters_nobody_else_may_use_its_ray_and_a_dead_ray_ends_it(
    tiny: Bundle, tmp_path: Path
) -> None:
    """One start for all that it does not depend on, on IPv6; then Ray's node is killed."""
    environment = {
        "HOME": "/proc",
        "TMPDIR": "/tmp/" + "x" * 120,
        "MONOFACET_SERVICE_HOST": "10.96.0.12",
        "MONOFACET_HEALTH_PORT": "tcp://10.96.0.14:9001",
        "RAY_ADDRESS": "10.255.255.1:6379",
        "RAY_AUTH_MODE": "disabled",
        "RAY_GCS_SERVER_PORT": "1",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"working_dir": "/nowhere"}}',
        "RAY_NAMESPACE": "theirs",
        "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": "",
        "RAY_REDIS_ADDRESS": "10.255.255.1:6379",
        "RAY_RUNTIME_ENV_HOOK": "no.such.hook",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_TMPDIR": "/nowhere",
        "RAY_USE_TLS": "1",
    }
    service = start_service(
        tiny.path, tmp_path / "log", ["--host", "::1", "--metrics-host", "[::1]"], environment
    )
    folder = folder_of(service)
    assert service.target.startswith("[::1]:") and "http://[::1]:" in service.metrics_url
    assert "MONOFACET_HEALTH_PORT is not read" in service.log.read_text()
    with monofacet.Client(service.target, timeout=240) as client:
        assert len(client.encode(["red circle"]).norms) == 1
    below = service.descendants()
    (node,) = (pid for pid in below if psutil.Process(pid).name() == "raylet")
    found = re.search(r"gcs[-_]address=(\S+)", " ".join(psutil.Process(node).cmdline()))
    assert found
    own = psutil.Process(node).environ()["RAY_AUTH_TOKEN"]
    for mode, token, enters in (("disabled", "", False), ("token", "a guess", False), ("token", own, True)):
        tried = subprocess.run(
            [sys.executable, "-c", STRANGER, found[1]],
            env={**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token},
            capture_output=True,
            text=True,
            timeout=STOP_TIMEOUT_S,
        )
        assert ("keys" in tried.stdout) is enters, tried.stderr
        assert enters or "InvalidAuthToken" in tried.stderr
    os.kill(node, signal.SIGKILL)
    assert service.process.wait(STOP_TIMEOUT_S) == 1
    assert left(below) == []
    assert not folder.exists()
    assert service.log.read_text().count("cannot go on: Ray: its process raylet has died") == 1


def test_the_next_start_sweeps_what_a_killed_one_left_and_a_storm_of_signals_is_one_stop(
    served: Bundle, tmp_path: Path
) -> None:
    """Both processes of the command are killed; the next one gets SIGHUP amid a generation, and then all others."""
    # Another server of this machine may sweep /tmp meanwhile. Short, for the sockets.
    place = tempfile.mkdtemp(dir="/tmp")
    quick = {"TMPDIR": place, "MONOFACET_GENERATOR": "false"}
    killed = start_service(served.path, tmp_path / "killed", environment=quick)
    orphans = killed.descendants()
    abandoned = folder_of(killed)
    for child in psutil.Process(killed.process.pid).children():
        # Neither sees the other die.
        os.kill(child.pid, signal.SIGSTOP)
    killed.process.kill()
    killed.process.wait()
    for pid in orphans:
        if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
            os.kill(pid, signal.SIGKILL)
    service = start_service(served.path, tmp_path / "log", environment={"TMPDIR": place})
    assert f"removed {abandoned}" in service.log.read_text()
    assert not abandoned.exists()
    assert left(orphans) == []
    below, folder = service.descendants(), folder_of(service)
    with monofacet.Client(service.target, timeout=240) as client, ThreadPoolExecutor(1) as pool:
        client.generate("red circle", seeds=1)
        flying = pool.submit(client.generate, "red circle", seeds=[1, 2, 3, 4])
        time.sleep(0.5)
        service.process.send_signal(signal.SIGHUP)
        while service.process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                service.process.send_signal(number)
            time.sleep(0.01)
        assert len(flying.result().images) == 4
    assert service.process.returncode == 0
    assert left(below) == []
    assert folder.parent == Path(place) and not folder.exists()
    Path(place).rmdir()
    printed = service.log.read_text()
    assert printed.endswith("monofacet: stopped\n")
    assert printed.count("monofacet: stopping") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["--host", "::"], {}, "will not listen on :: in plain text"),
        (["--host", "no.such.host.invalid", "--insecure"], {}, "cannot listen on no.such.host.invalid:"),
        (["--host", "192.0.2.1", "--insecure", "--port", "9000"], {}, "cannot listen on 192.0.2.1:9000: "),
        (["--port", "9000", "--metrics-port", "9000"], {}, "port and metrics_port are both 9000"),
        (["--host", "0.0.0.0"], {}, "will not listen on 0.0.0.0 in plain text"),
        (["--tls-cert", "/nowhere.crt", "--tls-key", "/nowhere.key"], {}, "tls: /nowhere.crt: No such file"),
        (["--tokens-file", "/nowhere"], {}, "tokens_file: /nowhere: No such file"),
        ([], {"MONOFACET_TOKENS": "alice read never hunter2"}, "tokens: line 1: the fourth word"),
        ([], {"MONOFACET_MAX_ITEMS": "0"}, "max_items: "),
        (["--metrics-port", "TAKEN"], {}, "cannot listen on 127.0.0.1:"),
        (["--http-port", "TAKEN"], {}, "cannot listen on 127.0.0.1:"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line(
    tiny: Bundle, tmp_path: Path, arguments: list[str], environment: dict[str, str], line: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in arguments]
        with pytest.raises(RuntimeError) as caught:
            start_service(tiny.path, tmp_path / "log", arguments, environment)
    printed = (tmp_path / "log").read_text()
    assert line in str(caught.value)
    assert printed.count("\n") == 1
    assert printed.startswith("monofacet: ")
    assert "hunter2" not in printed
