"""Every Prometheus metric of the server, in one table.

Only the gateway observes: replicas return their timings with their answers, so one port tells everything
and no multi-process mode is needed. The alert rules and the dashboard are generated from the same rows
(`deployments.operations.monitoring`), so no name or label can drift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

Kind = TypeVar("Kind", Counter, Gauge, Histogram)


def geometric_buckets(first: float, last: float, factor: float = 2.0) -> tuple[float, ...]:
    """Return histogram bounds that grow by `factor`, so that the relative error is the same everywhere.

    Parameters
    ----------
    first, last
        The first bound, and the value that the last bound reaches or passes. Same unit.
    factor
        Ratio of one bound to the one before.
    """
    bounds = [first]
    while bounds[-1] < last:
        bounds.append(bounds[-1] * factor)
    return tuple(bounds)


SECONDS = geometric_buckets(0.001, 60.0)
# Of what may take minutes: generations, audits, and waiting for a generator.
LONG_SECONDS = geometric_buckets(0.001, 1000.0)
ITEMS = geometric_buckets(1, 256)


@dataclass(frozen=True, slots=True)
class Row(Generic[Kind]):
    """One metric.

    Attributes
    ----------
    kind
        The class of prometheus-client.
    name
        As Prometheus shows it; a histogram's series add `_bucket`, `_sum` and `_count`.
    help
        What is measured.
    labels
        Names of the labels that tell its series apart.
    buckets
        Upper bounds, of a histogram only.
    """

    kind: type[Kind]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def make(self, registry: CollectorRegistry) -> Kind:
        """Return the metric, registered."""
        options: dict[str, Any] = {"buckets": self.buckets} if self.buckets else {}
        return self.kind(self.name, self.help, self.labels, registry=registry, **options)


# Calls.
REQUEST_DURATION = Row(
    Histogram,
    "monofacet_request_duration_seconds",
    "From the first byte of a call to its status; the bundle is empty for a call that ended before its own was known.",
    ("method", "code", "bundle"),
    LONG_SECONDS,
)
REQUESTS_IN_FLIGHT = Row(Gauge, "monofacet_requests_in_flight", "Calls in progress.", ("method",))
ITEMS_TOTAL = Row(Counter, "monofacet_items_total", "Images and texts answered.", ("method",))
REJECTED = Row(Counter, "monofacet_rejected_total", "Calls and stream items refused, by reason.", ("reason",))
# The models.
QUEUE_DURATION = Row(
    Histogram,
    "monofacet_queue_duration_seconds",
    "From arrival at the gateway to the start of the first forward that holds the request.",
    ("deployment",),
    LONG_SECONDS,
)
QUEUE_ITEMS = Row(
    Gauge,
    "monofacet_queue_items",
    "Items (of a generator: images) that the gateway let in and that are not answered yet: they wait for the "
    "deployment, or run there.",
    ("deployment",),
)
DECODE_DURATION = Row(
    Histogram,
    "monofacet_decode_duration_seconds",
    "Of one request: from its arrival at the encoder until its last image is decoded, beside other requests' forwards.",
    ("deployment",),
    SECONDS,
)
INFERENCE_DURATION = Row(
    Histogram,
    "monofacet_inference_duration_seconds",
    "One forward: of the towers and the dictionaries, or one step of a diffusion.",
    ("deployment", "backend"),
    SECONDS,
)
BATCH_SIZE = Row(Histogram, "monofacet_batch_size", "Items of one forward.", ("deployment",), ITEMS)
GENERATION_STEPS = Row(
    Counter, "monofacet_generation_steps_total", "Denoising steps done, counted once an image."
)
VERDICTS = ("clean", "adversarial")
ADVERSARIAL = Row(
    Counter, "monofacet_adversarial_total", "Images that FilterAdversarial judged, by verdict.", ("verdict",)
)
# The server itself.
MODEL_INFO = Row(
    Gauge,
    "monofacet_model_info",
    "Always 1; the labels say what is served.",
    ("bundle", "sha256", "device"),
)
SERVING = Row(Gauge, "monofacet_serving", "1 while the health service says SERVING, else 0.", ("service",))
DRAINING = Row(Gauge, "monofacet_draining", "1 once the gateway is stopping, else 0.")
REPLICA_RESTARTS = Row(
    Counter,
    "monofacet_replica_restarts_total",
    "Replicas that this gateway found dead or gone.",
    ("deployment",),
)
# What may be in use at once, and is: a limit without its use says nothing, nor a use without its limit.
LIMIT = Row(
    Gauge,
    "monofacet_limit",
    "What this gateway lets a setting's resource be at most; the deployment is empty for what all share.",
    ("limit", "deployment"),
)
LIMIT_USED = Row(Gauge, "monofacet_limit_used", "How much of a limit is in use now.", ("limit", "deployment"))
# Of the replicas, as the gateway sees them.
STALLED = Row(
    Gauge,
    "monofacet_stalled_seconds",
    "How long work has been in flight at a deployment without any of it being answered; 0 while nothing is.",
    ("deployment",),
)
REPLICAS_HUNG = Row(
    Gauge,
    "monofacet_replicas_hung",
    "Replicas that do not answer, or whose model does not get anywhere. Each is ended and replaced.",
    ("deployment",),
)
_REPLICA = ("deployment", "replica")
REPLICAS_FAULTY = Row(
    Gauge,
    "monofacet_replicas_faulty",
    "Replicas that could not load their model; the log says why.",
    ("deployment",),
)
REPLICA_SILENT = Row(
    Gauge,
    "monofacet_replica_silent_seconds",
    "How long a replica has owed an answer to the gateway.",
    _REPLICA,
)
REPLICA_CPUS = Row(
    Gauge, "monofacet_replica_cpus", "CPUs that a replica used over the last seconds.", _REPLICA
)
REPLICA_MEMORY = Row(Gauge, "monofacet_replica_memory_bytes", "Resident memory of a replica.", _REPLICA)
REPLICA_GPU_MEMORY = Row(
    Gauge, "monofacet_replica_gpu_memory_bytes", "Memory of its GPU that a replica holds.", _REPLICA
)
TLS_EXPIRY = Row(
    Gauge,
    "monofacet_tls_expiry_timestamp_seconds",
    "When the certificate in use expires; 0 without TLS.",
)
TLS_REFUSED = Row(
    Counter,
    "monofacet_tls_refused_total",
    "Renewed certificates that could not be used: expired, not valid yet, or without their key.",
)

TABLE: tuple[Row[Any], ...] = (
    REQUEST_DURATION,
    REQUESTS_IN_FLIGHT,
    ITEMS_TOTAL,
    REJECTED,
    QUEUE_DURATION,
    QUEUE_ITEMS,
    DECODE_DURATION,
    INFERENCE_DURATION,
    BATCH_SIZE,
    GENERATION_STEPS,
    ADVERSARIAL,
    MODEL_INFO,
    SERVING,
    DRAINING,
    REPLICA_RESTARTS,
    LIMIT,
    LIMIT_USED,
    STALLED,
    REPLICAS_HUNG,
    REPLICAS_FAULTY,
    REPLICA_SILENT,
    REPLICA_CPUS,
    REPLICA_MEMORY,
    REPLICA_GPU_MEMORY,
    TLS_EXPIRY,
    TLS_REFUSED,
)


class Metrics:
    """The metrics of one gateway, on a registry of their own so that tests can have several.

    Parameters
    ----------
    registry
        Where the metrics are registered; a new registry by default.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.request_duration = REQUEST_DURATION.make(r)
        self.requests_in_flight = REQUESTS_IN_FLIGHT.make(r)
        self.items = ITEMS_TOTAL.make(r)
        self.rejected = REJECTED.make(r)
        self.queue_duration = QUEUE_DURATION.make(r)
        self.queue_items = QUEUE_ITEMS.make(r)
        self.decode_duration = DECODE_DURATION.make(r)
        self.inference_duration = INFERENCE_DURATION.make(r)
        self.batch_size = BATCH_SIZE.make(r)
        self.generation_steps = GENERATION_STEPS.make(r)
        self.adversarial = ADVERSARIAL.make(r)
        for verdict in VERDICTS:
            # Prometheus sees no growth in a series whose first sample is not zero.
            self.adversarial.labels(verdict)
        self.model_info = MODEL_INFO.make(r)
        self.serving = SERVING.make(r)
        self.draining = DRAINING.make(r)
        self.replica_restarts = REPLICA_RESTARTS.make(r)
        self.limit = LIMIT.make(r)
        self.limit_used = LIMIT_USED.make(r)
        self.stalled = STALLED.make(r)
        self.replicas_hung = REPLICAS_HUNG.make(r)
        self.replicas_faulty = REPLICAS_FAULTY.make(r)
        self.replica_silent = REPLICA_SILENT.make(r)
        self.replica_cpus = REPLICA_CPUS.make(r)
        self.replica_memory = REPLICA_MEMORY.make(r)
        self.replica_gpu_memory = REPLICA_GPU_MEMORY.make(r)
        self.tls_expiry = TLS_EXPIRY.make(r)
        self.tls_refused = TLS_REFUSED.make(r)

    def limited(self, name: str, limit: float, used: Callable[[], float], deployment: str = "") -> None:
        """Show a limit beside its use.

        Parameters
        ----------
        name
            Of the setting.
        limit
            Its value.
        used
            How much is in use; called at every scrape, by another thread.
        deployment
            Whose it is; empty for what all share.
        """
        self.limit.labels(name, deployment).set(limit)
        self.limit_used.labels(name, deployment).set_function(used)
