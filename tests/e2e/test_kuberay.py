"""What KubeRay does to a cluster of the chart's, done here without Kubernetes.

Ray is started by the command that KubeRay makes of the rendered head, all nodes in one; the rendered Serve config is
sent to the dashboard and its status read, as the operator does; the pods' own probes and hook are run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.bundle.load import Bundle
from tests.helm.chart import PLAIN, Values, of_kind, pods
from tests.support.ports import free_port
from tests.support.service import descendants

LIMIT_S = 400
pytestmark = pytest.mark.timeout(2 * LIMIT_S)
AGENT = 52365


def asked(url: str, body: Any = None) -> Any:
    """Return what an address answers, once something answers there; with a body it is sent by PUT."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json"}, method="GET" if body is None else "PUT"
    )
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            if error.code < 500 or time.monotonic() > deadline:
                raise RuntimeError(error.read().decode()) from error
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kuberay")
    # Unix sockets lie below it, and their paths may have 107 characters; that of a test beside others is longer.
    short = Path(tempfile.mkdtemp(prefix="mf-k"))
    values: Values = {**PLAIN, "encoder": {"cpus": 1, "maxReplicas": 1}, "gateway": {"replicas": 1}}
    (service,) = of_kind(values, "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    params = head["rayStartParams"] | {name: str(port) for name, port in ports.items()}
    # What the other groups would bring, and what keeps it on this machine.
    params |= {
        "num-cpus": "2",
        "resources": '\'{"gateway": 1, "encoder": 1}\'',
        "dashboard-host": "127.0.0.1",
        "node-ip-address": "127.0.0.1",
        "metrics-export-port": str(free_port()),
        "ray-client-server-port": str(free_port()),
        "block": "true",
    }
    words = [
        f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(params.items())
    ]
    command = f"{Path(sys.executable).with_name('ray')} start --head --temp-dir={short} {' '.join(words)}"
    (container,) = head["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/bash", "-c", command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment, "HOME": str(folder)},
            start_new_session=True,
        )
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["applications"][0]["args"] |= {
        "bundle": str(tiny.path),
        "host": "127.0.0.1",
        "metrics_host": "127.0.0.1",
        "port": free_port(),
        "health_port": free_port(),
        "metrics_port": free_port(),
        "drain_file": str(folder / "drain"),
        "drain_s": 10,
        "linger_s": 0.5,
    }
    try:
        yield {"ports": ports, "config": config, "pods": pods(service), "log": log}
    finally:
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in below & descendants(1):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)


def applications(cluster: dict[str, Any]) -> dict[str, Any]:
    url = f"http://127.0.0.1:{cluster['ports']['dashboard-port']}/api/serve/applications/"
    found: dict[str, Any] = json.loads(asked(url))["applications"]
    return found


def test_the_head_and_its_workers_are_ready_and_the_application_runs(cluster: dict[str, Any]) -> None:
    dashboard, agent = (cluster["ports"][n] for n in ("dashboard-port", "dashboard-agent-listen-port"))
    # KubeRay's own probes of the head: by wget up to 1.5, and over HTTP from 1.6 on.
    assert "success" in asked(f"http://127.0.0.1:{dashboard}/api/gcs_healthz")
    assert "success" in asked(f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
    asked(f"http://127.0.0.1:{agent}/api/healthz")
    # The encoder's probe, as its pod has it.
    (container,) = cluster["pods"]["encoder"]["spec"]["containers"]
    command = container["readinessProbe"]["exec"]["command"]
    assert str(AGENT) in command[-1]
    subprocess.run([*command[:-1], command[-1].replace(str(AGENT), str(agent))], check=True, timeout=60)
    # Before anything is sent there is no application, and KubeRay sends the config.
    assert applications(cluster) == {}
    asked(f"http://127.0.0.1:{dashboard}/api/serve/applications/", cluster["config"])
    deadline = time.monotonic() + LIMIT_S
    while (state := applications(cluster).get("monofacet", {})).get("status") != "RUNNING":
        # Assertions cut what they show; why it failed must be read.
        if state.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            pytest.fail(json.dumps(state, indent=1, default=str))
        assert time.monotonic() < deadline, (state, cluster["log"].read_text())
        time.sleep(0.5)
    assert set(state["deployments"]) == {"gateway", "encoder"}
    assert {deployment["status"] for deployment in state["deployments"].values()} == {"HEALTHY"}


def test_a_gateway_is_ready_and_its_hook_waits_until_it_has_drained(cluster: dict[str, Any]) -> None:
    settings = cluster["config"]["applications"][0]["args"]
    (container,) = cluster["pods"]["gateway"]["spec"]["containers"]
    assert "grpc" in container["readinessProbe"]
    with grpc.insecure_channel(f"127.0.0.1:{settings['health_port']}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + LIMIT_S
        while True:
            answer = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=LIMIT_S)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    script = re.sub(r"/tmp/monofacet-drain", settings["drain_file"], command[-1])
    script = script.replace("/9001)", f"/{settings['health_port']})")
    assert script != command[-1]
    subprocess.run([*command[:-1], script], check=True, timeout=LIMIT_S)
    # The hook ends when the health port has closed: nothing is left to wait for.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", settings["health_port"]), timeout=10)
