"""A real Prometheus, on a free loopback port, that scrapes one service every second."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.operations.chart import RULES
from tests.observability.tools import tool
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S, eventually

JOB = "monofacet"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus; `url` is its own address."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """Return the `data` of one answer of the HTTP interface."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}{query}", timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of every series of an instant query; `at` is a Unix time (s)."""
        moment = {} if at is None else {"time": f"{at:.3f}"}
        result = self.get("query", query=expression, **moment)["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in result]


@contextmanager
def running_prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    """Start a Prometheus that scrapes `target` (`host:port`) and has the chart's rules loaded."""
    config = {
        # Fast, so that a test of seconds has something to see.
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
    }
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, (directory / "prometheus.log").read_text()
        try:
            urllib.request.urlopen(f"{server.url}/-/ready", timeout=5).close()
        except OSError:
            return False
        return True

    try:
        eventually(ready, "Prometheus is ready")
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
