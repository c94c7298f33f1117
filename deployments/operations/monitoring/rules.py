"""Recording rules and alerts.

The error budget's alerts are those of the Site Reliability Workbook (Beyer et al., 2018, chapter 5): a long
window shows that the budget really burns, a short one that it still does.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from monofacet import v1

from deployments.operations import metrics as m
from deployments.operations.monitoring.promql import calls, increase, quantile, rate, select
from deployments.operations.pulse import LATE_S
from deployments.operations.settings import Settings

# Of the calls that a caller had a right to have answered, how many are.
AVAILABILITY = 0.999
# Seconds within which 99% of the unary calls of each method are answered. A full batch of 256 items takes about
# a second on two cores with the embedded bundle.
P99_S = 2.0
# Seconds that 95% of the work waits for a model at most: twice what a request is let in for. One that waits longer was
# let in because it fits one forward or is large, so the model is slow for the work that it is given.
QUEUE_P95_S = 2 * Settings.model_fields["max_queue_s"].default
# An image takes seconds, so a turn comes in tens of them.
GENERATOR_QUEUE_P95_S = 30.0
# Share of the calls that may be refused for want of room.
SHED_RATIO = 0.05
# Calls a second below which a quantile says nothing.
MIN_RATE = 0.1
CERTIFICATE_DAYS = 14
DAY_S = 86_400
# Between two evaluations of a group, and of the group of failures, which are told within 15 s of their beginning where
# the gateways are scraped every 5 s.
INTERVAL_S = 30
FAILURES_INTERVAL_S = 5
# Seconds without any answer to the work in flight, of an encoder and of a generator: a step of large pictures may take
# many.
STALLED_S = 10
GENERATOR_STALLED_S = 120

# The caller did nothing wrong and has no answer.
FAILED = '=~"INTERNAL|UNKNOWN|DATA_LOSS|UNAVAILABLE|DEADLINE_EXCEEDED"'
# Overload, as opposed to one caller over its own limits.
OVERLOAD = '=~"QUEUE_FULL|TOO_MANY_CALLS"'
# With several bundles each has a generator of its own: `deployments.operations.served.deployment_of`.
_GENERATOR, _GENERATOR_NOT = '=~"generator(-.*)?"', '!~"generator(-.*)?"'
ERROR_RATIO = "monofacet:error_ratio:rate"


@dataclass(frozen=True, slots=True)
class Burn:
    """One pair of windows: alert when both burn the budget `factor` times too fast for `hold`."""

    long: str
    short: str
    factor: float
    hold: str
    severity: str


BURNS = (
    Burn("1h", "5m", 14.4, "2m", "critical"),
    Burn("6h", "30m", 6.0, "15m", "critical"),
    Burn("1d", "2h", 3.0, "1h", "warning"),
    Burn("3d", "6h", 1.0, "3h", "warning"),
)


def streaming_methods() -> list[str]:
    """Return the full names of all methods with a stream: they last as long as their callers like."""
    stubs = (
        importlib.import_module(f"{v1.__name__}.{module.name}")
        for module in pkgutil.iter_modules(v1.__path__)
        if module.name.endswith("_service_pb2")
    )
    return sorted(
        f"{service.full_name}/{method.name}"
        for stub in stubs
        for service in stub.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.client_streaming or method.server_streaming
    )


def unary() -> str:
    """Return the matcher of the methods that answer one request once."""
    return f'!~"{"|".join(streaming_methods())}"'


def recording_rules() -> list[dict[str, Any]]:
    """Return one rule for each window of the error budget's alerts: failed calls over all calls."""
    windows = dict.fromkeys(window for burn in BURNS for window in (burn.short, burn.long))
    return [
        {
            "record": f"{ERROR_RATIO}{window}",
            # A job without one failure has no series of failures; its ratio is 0, not absent.
            "expr": f"({calls(m.REQUEST_DURATION, window, code=FAILED)} or "
            f"{calls(m.REQUEST_DURATION, window)} * 0) / {calls(m.REQUEST_DURATION, window)}",
        }
        for window in windows
    ]


def _alert(
    name: str, expr: str, hold: str, severity: str, summary: str, description: str, **labels: str
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": hold,
        "labels": {"severity": severity, **labels},
        "annotations": {"summary": summary, "description": description},
    }


def alerts() -> list[dict[str, Any]]:
    """Return every alert."""
    budget = 1 - AVAILABILITY
    slow = quantile(0.99, m.REQUEST_DURATION, "10m", ("job", "method"), method=unary())
    busy = calls(m.REQUEST_DURATION, "10m", ("job", "method"), method=unary())
    shed = f"{rate(m.REJECTED, '5m', reason=OVERLOAD)} / {calls(m.REQUEST_DURATION, '5m')}"
    ours = select(m.MODEL_INFO)

    def waiting(deployment: str) -> str:
        return quantile(0.95, m.QUEUE_DURATION, "10m", ("job", "deployment"), deployment=deployment)

    return [
        *(
            _alert(
                "MonofacetErrorBudgetBurn",
                f"{ERROR_RATIO}{burn.long} > {burn.factor * budget:.6g} and "
                f"{ERROR_RATIO}{burn.short} > {burn.factor * budget:.6g}",
                burn.hold,
                burn.severity,
                f"Calls fail {burn.factor:g} times faster than the error budget allows.",
                f"{{{{ $value | humanizePercentage }}}} of the calls of {{{{ $labels.job }}}} failed over "
                f"{burn.long}; {budget:.2%} is the budget. The log has each failure; see also the codes on the "
                "dashboard.",
                window=burn.long,
            )
            for burn in BURNS
        ),
        _alert(
            "MonofacetSlow",
            f"{slow} > {P99_S:g} and {busy} > {MIN_RATE:g}",
            "10m",
            "warning",
            "Unary calls are slow.",
            f"The 99th percentile of {{{{ $labels.method }}}} is {{{{ $value | humanizeDuration }}}}; "
            f"{P99_S:g} s is the objective. If the queue is long, add encoder replicas; if inference is, look "
            "at the size of the requests.",
        ),
        _alert(
            "MonofacetQueueLong",
            f"{waiting(_GENERATOR_NOT)} > {QUEUE_P95_S:g} or {waiting(_GENERATOR)} > {GENERATOR_QUEUE_P95_S:g}",
            "10m",
            "warning",
            "Work waits long for a model.",
            "5% of the work for the {{ $labels.deployment }} waited more than "
            "{{ $value | humanizeDuration }}. Raise its largest number of replicas.",
        ),
        _alert(
            "MonofacetShedding",
            f"{shed} > {SHED_RATIO:g}",
            "5m",
            "critical",
            "Calls are refused for want of room.",
            "{{ $value | humanizePercentage }} of the calls of {{ $labels.job }} were refused over 5 minutes. "
            "Add replicas or gateways, or limit the callers' rates.",
        ),
        _alert(
            "MonofacetReplicasDie",
            f"{increase(m.REPLICA_RESTARTS, '15m', ('job', 'deployment'))} >= 2",
            "0m",
            "warning",
            "Replicas of a model die.",
            "Gateways found replicas of the {{ $labels.deployment }} dead {{ $value | humanize }} times in 15 "
            "minutes. Look for memory limits and for the replica's last log lines.",
        ),
        _alert(
            "MonofacetGatewayRestarts",
            f"changes(process_start_time_seconds[30m]) >= 2 and on (job, instance) {ours}",
            "0m",
            "warning",
            "A gateway restarts again and again.",
            "The gateway at {{ $labels.instance }} started {{ $value | humanize }} times in 30 minutes.",
        ),
        _alert(
            "MonofacetNotServing",
            f"max by (job, service) ({select(m.SERVING)}) == 0",
            "5m",
            "critical",
            "No gateway serves a service.",
            "Every gateway of {{ $labels.job }} says NOT_SERVING for {{ $labels.service }}; its log says why.",
        ),
        _alert(
            "MonofacetAbsent",
            f"absent({ours})",
            "5m",
            "critical",
            "No gateway is scraped.",
            "Prometheus sees no Monofacet at all: nothing runs, or the scrape is broken.",
        ),
        _alert(
            "MonofacetCertificateExpires",
            f"0 < {select(m.TLS_EXPIRY)} < time() + {CERTIFICATE_DAYS * DAY_S}",
            "1h",
            "warning",
            "The certificate in use expires soon.",
            "The certificate of {{ $labels.instance }} expires at {{ $value | humanizeTimestamp }}. A renewed "
            "one is taken without a restart; this one has not been renewed.",
        ),
    ]


def failures() -> list[dict[str, Any]]:
    """Return the alerts of what stands still; they hold at once, since what they look at has waited already."""

    def worst(row: m.Row[Any], **matchers: str) -> str:
        return f"max by (job, deployment) ({select(row, **matchers)})"

    stalled = (
        f"{worst(m.STALLED, deployment=_GENERATOR_NOT)} > {STALLED_S} or "
        f"{worst(m.STALLED, deployment=_GENERATOR)} > {GENERATOR_STALLED_S}"
    )
    return [
        _alert(
            "MonofacetReplicaHung",
            f"{worst(m.REPLICA_SILENT)} > {LATE_S:g} or {worst(m.REPLICAS_HUNG)} > 0",
            "0m",
            "critical",
            "A replica stands still.",
            "A replica of the {{ $labels.deployment }} does not answer or its model is stuck. It is ended and "
            "replaced; the gateway's log says what was seen.",
        ),
        _alert(
            "MonofacetStalled",
            stalled,
            "0m",
            "critical",
            "Work is in flight and none of it is answered.",
            "Nothing of what was sent to the {{ $labels.deployment }} was answered for "
            "{{ $value | humanizeDuration }}.",
        ),
        _alert(
            "MonofacetReplicaFaulty",
            f"{worst(m.REPLICAS_FAULTY)} > 0",
            "0m",
            "critical",
            "A replica cannot load its model.",
            "{{ $value | humanize }} replicas of the {{ $labels.deployment }} have no model: the bundle is gone or was "
            "changed, or memory is short; the log says which. Serve starts them again until they have.",
        ),
    ]


def rules() -> dict[str, Any]:
    """Return the rule file, as Prometheus reads it."""
    return {
        "groups": [
            {"name": "monofacet.records", "interval": f"{INTERVAL_S}s", "rules": recording_rules()},
            {"name": "monofacet.alerts", "interval": f"{INTERVAL_S}s", "rules": alerts()},
            {"name": "monofacet.failures", "interval": f"{FAILURES_INTERVAL_S}s", "rules": failures()},
        ]
    }
