"""A real Prometheus scrapes the running service, holds its rules, and has data for every panel."""

from __future__ import annotations

import bisect
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import monofacet
import numpy as np
import pytest

from benchmarks.pictures import write_pictures
from deployments.operations import metrics as m
from deployments.operations.monitoring.dashboard import dashboard
from deployments.operations.monitoring.promql import quantile
from deployments.operations.monitoring.rules import INTERVAL_S, rules
from services.bundle.load import Bundle
from tests.observability.server import JOB, Prometheus, running_prometheus
from tests.support.service import Service, metric
from tests.support.waiting import CALL_S, PATIENCE_S, eventually

ROOT = Path(__file__).parents[2]
CALLERS = 4
LOAD_S = 8.0
ENCODE = "monofacet.v1.FeatureService/Encode"


@dataclass(frozen=True, slots=True)
class Observed:
    """What the load generator measured (s), and the Prometheus that watched.

    `began` and `end` are Unix times (s); `counts` says how many calls of Encode between them took no longer than
    each bound of a bucket.
    """

    prometheus: Prometheus
    latencies: np.ndarray[Any, np.dtype[np.float64]]
    began: float
    end: float
    counts: list[float]


def bucket_counts(service: Service) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how many calls of Encode took no longer than each bound of a bucket, as the service says itself."""
    name, labels = f"{m.REQUEST_DURATION.name}_bucket", {"method": ENCODE, "code": "OK"}
    return np.array([metric(service, name, le=f"{bound}", **labels) for bound in (*m.SECONDS, "+Inf")])


def call_everything(target: str, image: bytes) -> None:
    """Call what the load generator does not, with one refusal, so that every panel has something to show."""
    with monofacet.Client(target, timeout=CALL_S) as client:
        client.encode([image, "a red heart"], dictionary="")
        client.classify_modality([image])
        with pytest.raises(monofacet.MonofacetError):
            client.encode([b"not an image"])


@pytest.fixture(scope="module")
def observed(
    running_service: Service, tiny: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    images = [path.read_bytes() for path in sorted((tiny.path / "samples").glob("*.png"))]
    write_pictures(images)
    target = urlsplit(running_service.metrics_url).netloc
    before, began = bucket_counts(running_service), time.time()
    with running_prometheus(target, tmp_path_factory.mktemp("prometheus")) as prometheus:
        call_everything(running_service.target, images[0])
        # The first sample of a series is the zero that its growth is counted from.
        eventually(
            lambda: bool(prometheus.query(f'{m.REQUEST_DURATION.name}_count{{method="{ENCODE}"}}')), "scraped"
        )
        command = [
            sys.executable,
            "-m",
            "benchmarks.load",
            running_service.target,
            str(CALLERS),
            "1",
            str(LOAD_S),
        ]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        call_everything(running_service.target, images[0])
        end = time.time()
        # One scrape after the last call.
        scraped = f'timestamp(up{{job="{JOB}"}})'
        eventually(lambda: prometheus.query(scraped)[0][1] > end, "a scrape after the last call")
        counts = bucket_counts(running_service) - before
        yield Observed(
            prometheus,
            np.array(json.loads(done.stdout)["latencies"]),
            began,
            prometheus.query(scraped)[0][1],
            counts.tolist(),
        )


def test_the_service_is_scraped(observed: Observed) -> None:
    (target,) = observed.prometheus.get("targets")["activeTargets"]
    assert (target["labels"]["job"], target["health"], target["lastError"]) == (JOB, "up", "")


def test_the_chart_s_rules_are_loaded_and_evaluate_without_error(observed: Observed) -> None:
    groups = observed.prometheus.get("rules")["groups"]
    assert {g["name"] for g in groups} == {g["name"] for g in rules()["groups"]}
    loaded = [rule for group in groups for rule in group["rules"]]
    assert len(loaded) == sum(len(group["rules"]) for group in rules()["groups"])
    assert [(rule["name"], rule.get("lastError")) for rule in loaded if rule["health"] == "err"] == []
    ratio = "monofacet:error_ratio:rate5m"
    # The group's turn comes once in its interval; two, in case the first found too few scrapes.
    turns = 2 * INTERVAL_S + PATIENCE_S
    eventually(lambda: bool(observed.prometheus.query(ratio)), "recorded", turns)
    # The recorded ratio of a service that failed nobody.
    assert [value for _, value in observed.prometheus.query(ratio)] == [0.0]


def test_a_healthy_service_fires_no_alert(observed: Observed) -> None:
    firing = [a["labels"] for a in observed.prometheus.get("alerts")["alerts"] if a["state"] == "firing"]
    assert firing == []


QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in dashboard()["panels"]
    for target in panel.get("targets", [])
]


@pytest.mark.parametrize("expression", QUERIES)
def test_every_query_of_the_dashboard_has_data(observed: Observed, expression: str) -> None:
    # What Grafana puts in for the choice "All", and a window that holds the load.
    filled = expression.replace("$job", ".*").replace("$__rate_interval", "30s")
    assert "$" not in filled
    values = [value for _, value in observed.prometheus.query(filled, observed.end)]
    assert any(math.isfinite(value) for value in values), values


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_quantiles_are_those_of_the_service_and_no_longer_than_the_callers_own(
    observed: Observed, q: float
) -> None:
    window = f"{math.ceil(observed.end - observed.began)}s"
    expression = quantile(q, m.REQUEST_DURATION, window, (), method=f'="{ENCODE}"', code='="OK"')
    ((_, ours),) = observed.prometheus.query(expression, observed.end)
    shown = bisect.bisect_left(m.SECONDS, ours)
    counts = observed.counts
    counted = next(i for i, below in enumerate(counts) if below >= q * counts[-1])
    # Prometheus extrapolates to the ends of the window, which may cross one bound.
    assert abs(shown - counted) <= 1
    # What the callers measured holds what the service did; how much more it is depends on the machine.
    assert shown <= bisect.bisect_left(m.SECONDS, float(np.quantile(observed.latencies, q))) + 1
