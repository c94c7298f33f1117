"""The Grafana dashboard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.operations import metrics as m
from deployments.operations.monitoring.promql import calls, increase, mean, quantile, rate, select
from deployments.operations.monitoring.rules import AVAILABILITY, FAILED, OVERLOAD, unary

# Grafana fills them in: the release, and a window of at least four scrapes.
OURS = '=~"$job"'
WINDOW = "$__rate_interval"
# Columns of Grafana's grid.
WIDTH = 24
UID = "monofacet"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes
    ----------
    title, description
        What is seen, and what to make of it.
    queries
        PromQL by legend; a legend names labels as `{{label}}`.
    unit
        Grafana's name of the unit.
    kind
        Grafana's panel type.
    width
        Columns, of 24.
    """

    title: str
    description: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8


def _quantiles(row: m.Row[Any], by: tuple[str, ...] = (), **matchers: str) -> dict[str, str]:
    shown = "".join(f" {{{{{label}}}}}" for label in by)
    return {
        f"p{round(q * 100)}{shown}": quantile(q, row, WINDOW, by, job=OURS, **matchers)
        for q in (0.5, 0.95, 0.99)
    }


def _process(name: str) -> str:
    # The process collector's names are prometheus-client's own; the join keeps other processes out.
    return f"{name}{{job{OURS}}} and on (job, instance) {select(m.MODEL_INFO, job=OURS)}"


def panels() -> dict[str, list[Panel]]:
    """Return the panels by row of the dashboard."""
    failed = calls(m.REQUEST_DURATION, WINDOW, (), job=OURS, code=FAILED)
    total = calls(m.REQUEST_DURATION, WINDOW, (), job=OURS)
    forwards = rate(m.INFERENCE_DURATION, WINDOW, ("deployment", "instance"), "_sum", job=OURS)
    return {
        "Now": [
            Panel("Calls", "Calls that ended, a second.", {"calls": total}, "reqps", "stat", 4),
            Panel(
                "Failed",
                f"Share of the calls that the server failed; the objective allows {1 - AVAILABILITY:.1%}.",
                {"failed": f"({failed} or vector(0)) / {total}"},
                "percentunit",
                "stat",
                4,
            ),
            Panel(
                "p99",
                "Of the unary calls, all methods together.",
                {"p99": quantile(0.99, m.REQUEST_DURATION, WINDOW, (), job=OURS, method=unary())},
                "s",
                "stat",
                4,
            ),
            Panel(
                "Items",
                "Images and texts answered, a second.",
                {"items": rate(m.ITEMS_TOTAL, WINDOW, (), job=OURS)},
                "short",
                "stat",
                4,
            ),
            Panel(
                "Gateways",
                "Gateways that are scraped, and those that are stopping.",
                {
                    "gateways": f"count({select(m.MODEL_INFO, job=OURS)})",
                    "stopping": f"sum({select(m.DRAINING, job=OURS)})",
                },
                "short",
                "stat",
                4,
            ),
            Panel(
                "Bundle",
                "What is served. Two at once only while a release is rolled out.",
                {"{{bundle}} on {{device}}": f"count by (bundle, device) ({select(m.MODEL_INFO, job=OURS)})"},
                "short",
                "stat",
                4,
            ),
        ],
        "Calls": [
            Panel(
                "Calls by method",
                "Calls that ended.",
                {"{{method}}": calls(m.REQUEST_DURATION, WINDOW, ("method",), job=OURS)},
                "reqps",
            ),
            Panel(
                "Calls by status",
                "INTERNAL is a defect; UNAVAILABLE a dead replica; RESOURCE_EXHAUSTED a refusal.",
                {"{{code}}": calls(m.REQUEST_DURATION, WINDOW, ("code",), job=OURS)},
                "reqps",
            ),
            Panel(
                "Calls in progress",
                "By method.",
                {"{{method}}": f"sum by (method) ({select(m.REQUESTS_IN_FLIGHT, job=OURS)})"},
            ),
            Panel(
                "Duration",
                "Of the unary calls, from the first byte to the status.",
                _quantiles(m.REQUEST_DURATION, method=unary()),
                "s",
            ),
            Panel(
                "p99 by method",
                "Streams last as long as their callers like.",
                {"{{method}}": quantile(0.99, m.REQUEST_DURATION, WINDOW, ("method",), job=OURS)},
                "s",
            ),
            Panel(
                "p99 by bundle",
                "Of the unary calls. Two versions of one bundle at once only while a release is rolled out.",
                {
                    "{{bundle}}": quantile(
                        0.99, m.REQUEST_DURATION, WINDOW, ("bundle",), job=OURS, method=unary(), bundle='!=""'
                    )
                },
                "s",
            ),
            Panel(
                "Items by method",
                "Images and texts answered.",
                {"{{method}}": rate(m.ITEMS_TOTAL, WINDOW, ("method",), job=OURS)},
            ),
        ],
        "Models": [
            Panel(
                "Waiting time",
                "From arrival to the first forward. It grows first when a model is too slow for the load.",
                _quantiles(m.QUEUE_DURATION, ("deployment",)),
                "s",
            ),
            Panel(
                "Items at a model",
                "Waiting or running, as the gateways count them; of a generator images. Up to a few batches keep it "
                "busy; more is a queue.",
                {"{{deployment}}": f"sum by (deployment) ({select(m.QUEUE_ITEMS, job=OURS)})"},
            ),
            Panel(
                "Duration of a forward",
                "Of one batch.",
                _quantiles(m.INFERENCE_DURATION, ("deployment", "backend")),
                "s",
            ),
            Panel(
                "Decoding",
                "Of the images of one request, in threads beside the model. When it grows, forwards lack work.",
                _quantiles(m.DECODE_DURATION, ("deployment",)),
                "s",
            ),
            Panel(
                "Batch size",
                "Mean items of a forward. Large batches are what load looks like, not trouble.",
                {"{{deployment}}": mean(m.BATCH_SIZE, WINDOW, ("deployment",), job=OURS)},
            ),
            Panel(
                "Models busy",
                "Seconds of forwards a second, summed over the replicas: 1 is one replica without a pause.",
                {"{{deployment}}": f"sum by (deployment) ({forwards})"},
            ),
            Panel(
                "Generation",
                "Denoising steps a second, counted once an image.",
                {"steps": rate(m.GENERATION_STEPS, WINDOW, (), job=OURS)},
            ),
        ],
        "Replicas": [
            Panel(
                "Standing still",
                "Seconds for which nothing of the work in flight was answered, and for which a replica owes an answer.",
                {
                    "{{deployment}}": f"max by (deployment) ({select(m.STALLED, job=OURS)})",
                    "{{deployment}} {{replica}}": f"max by (deployment, replica) "
                    f"({select(m.REPLICA_SILENT, job=OURS)})",
                },
                "s",
            ),
            Panel(
                "Hung or without a model",
                "The first are ended and replaced, the second start again until they find their bundle.",
                {
                    "{{deployment}} hung": f"max by (deployment) ({select(m.REPLICAS_HUNG, job=OURS)})",
                    "{{deployment}} faulty": f"max by (deployment) ({select(m.REPLICAS_FAULTY, job=OURS)})",
                },
            ),
            Panel(
                "Limits in use",
                "Share of what a gateway lets be in use at once; at 1 calls are refused or wait.",
                {
                    "{{limit}} {{deployment}} at {{instance}}": f"{select(m.LIMIT_USED, job=OURS)} / "
                    f"{select(m.LIMIT, job=OURS)}"
                },
                "percentunit",
            ),
            Panel(
                "CPUs",
                "That each replica uses.",
                {
                    "{{deployment}} {{replica}}": f"max by (deployment, replica) ({select(m.REPLICA_CPUS, job=OURS)})"
                },
            ),
            Panel(
                "Memory",
                "Resident bytes of each replica. It must not grow over days.",
                {
                    "{{deployment}} {{replica}}": f"max by (deployment, replica) "
                    f"({select(m.REPLICA_MEMORY, job=OURS)})"
                },
                "bytes",
            ),
            Panel(
                "GPU memory",
                "That each replica holds.",
                {
                    "{{deployment}} {{replica}}": f"max by (deployment, replica) "
                    f"({select(m.REPLICA_GPU_MEMORY, job=OURS)})"
                },
                "bytes",
            ),
        ],
        "Trouble": [
            Panel(
                "Refused by reason",
                "Bad input, access, and overload.",
                {"{{reason}}": rate(m.REJECTED, WINDOW, ("reason",), job=OURS)},
                "reqps",
            ),
            Panel(
                "Refused for want of room",
                "Share of all calls.",
                {
                    "refused": f"({rate(m.REJECTED, WINDOW, (), job=OURS, reason=OVERLOAD)} or vector(0)) / {total}"
                },
                "percentunit",
            ),
            Panel(
                "Dead replicas",
                "Found by the gateways in the last hour.",
                {"{{deployment}}": increase(m.REPLICA_RESTARTS, "1h", ("deployment",), job=OURS)},
            ),
            Panel(
                "Images by verdict",
                "Of FilterAdversarial.",
                {"{{verdict}}": rate(m.ADVERSARIAL, WINDOW, ("verdict",), job=OURS)},
            ),
            Panel(
                "Serving",
                "1 where the health service says SERVING.",
                {"{{service}} at {{instance}}": select(m.SERVING, job=OURS)},
            ),
            Panel(
                "Certificates refused",
                "Renewed ones of the last hour that could not be used; the log says why.",
                {"{{instance}}": increase(m.TLS_REFUSED, "1h", ("instance",), job=OURS)},
            ),
            Panel(
                "Gateway's memory",
                "Resident bytes. It must not grow over days.",
                {"{{instance}}": _process("process_resident_memory_bytes")},
                "bytes",
            ),
        ],
    }


def _shown(panel: Panel, number: int, x: int, y: int, height: int) -> dict[str, Any]:
    datasource = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": datasource,
        "gridPos": {"h": height, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": datasource, "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard, as Grafana imports it."""
    shown: list[dict[str, Any]] = []
    y = 0
    for title, row in panels().items():
        shown.append(
            {
                "id": len(shown) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
            }
        )
        y += 1
        height = 4 if row[0].kind == "stat" else 8
        x = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            shown.append(_shown(panel, len(shown) + 1, x, y, height))
            x += panel.width
        y += height
    return {
        "uid": UID,
        "title": "Monofacet",
        "tags": ["monofacet"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "job",
                    "type": "query",
                    "label": "Release",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": {"query": f"label_values({select(m.MODEL_INFO)}, job)", "refId": "job"},
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                    "multi": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": shown,
    }
