"""The rules and the dashboard are those of the metrics table, and the alerts do what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Histogram

from deployments.operations import metrics as m
from deployments.operations.chart import CHART, RULES, generated
from deployments.operations.monitoring.dashboard import WIDTH, dashboard
from deployments.operations.monitoring.promql import calls, rate, select
from deployments.operations.monitoring.rules import alerts, failures, streaming_methods
from tests.observability.tools import tool

RULE_TESTS = Path(__file__).with_name("rules_test.yaml")


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_the_chart_holds_what_the_code_says(path: Path) -> None:
    assert path.read_text() == generated()[path], "run: make chart"


def test_every_row_of_the_table_is_a_metric_and_every_metric_a_row() -> None:
    families = {f.name for f in m.Metrics().registry.collect() if f.name.startswith("monofacet_")}
    assert families == {row.name.removesuffix("_total") for row in m.TABLE}


def test_every_metric_of_the_table_is_shown() -> None:
    text = generated()[CHART / "files" / "dashboard.json"] + generated()[RULES]
    assert [row.name for row in m.TABLE if row.name not in text] == []


def test_histogram_buckets_are_geometric() -> None:
    for row in m.TABLE:
        ratios = {b / a for a, b in zip(row.buckets, row.buckets[1:], strict=False)}
        assert len(ratios) == (1 if row.kind is Histogram else 0), row.name


def test_a_query_with_an_unknown_label_or_series_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="no label methd"):
        select(m.ITEMS_TOTAL, methd='="x"')
    with pytest.raises(ValueError, match="no label reason"):
        calls(m.REQUEST_DURATION, "5m", ("reason",))
    with pytest.raises(ValueError, match="has no series"):
        select(m.ITEMS_TOTAL, "_bucket")
    with pytest.raises(ValueError, match="does not only grow"):
        rate(m.REQUESTS_IN_FLIGHT, "5m")


def test_streams_are_told_from_unary_methods_by_their_descriptors() -> None:
    methods = streaming_methods()
    assert "monofacet.v1.FeatureService/StreamEncode" in methods
    assert "monofacet.v1.FeatureService/Encode" not in methods


def test_the_rules_are_valid() -> None:
    done = subprocess.run([tool("promtool"), "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    done = subprocess.run([tool("promtool"), "test", "rules", RULE_TESTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    names = {alert["alert"] for alert in (*alerts(), *failures())}
    fired: set[str] = set()
    for case in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        fired |= {check["alertname"] for check in case.get("alert_rule_test", []) if check["exp_alerts"]}
        samples = [s for check in case.get("promql_expr_test", []) for s in check["exp_samples"]]
        fired |= {name for name in names for sample in samples if name in sample["labels"]}
    assert fired == names


def panels() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = dashboard()["panels"]
    return shown


def test_panels_have_a_place_of_their_own_and_a_description() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])
    assert len({panel["id"] for panel in panels()}) == len(panels())
