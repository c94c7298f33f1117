"""Every Prometheus metric of the server, in one table.

Only the gateway observes: replicas return their timings with their answers, so one port tells everything
and no multi-process mode is needed.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector


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
ITEMS = geometric_buckets(1, 256)


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
        self.request_duration = Histogram(
            "monofacet_request_duration_seconds",
            "From the first byte of a call to its status.",
            ["method", "code"],
            buckets=SECONDS,
            registry=r,
        )
        self.requests_in_flight = Gauge(
            "monofacet_requests_in_flight", "Calls in progress.", ["method"], registry=r
        )
        self.items = Counter("monofacet_items", "Images and texts answered.", ["method"], registry=r)
        self.queue_duration = Histogram(
            "monofacet_queue_duration_seconds",
            "From arrival at the gateway to the start of the first forward that holds the request.",
            ["deployment"],
            buckets=SECONDS,
            registry=r,
        )
        self.inference_duration = Histogram(
            "monofacet_inference_duration_seconds",
            "One forward of the towers and the dictionaries.",
            ["deployment", "backend"],
            buckets=SECONDS,
            registry=r,
        )
        self.batch_size = Histogram(
            "monofacet_batch_size", "Items of one forward.", ["deployment"], buckets=ITEMS, registry=r
        )
        self.rejected = Counter(
            "monofacet_rejected", "Calls and stream items refused, by reason.", ["reason"], registry=r
        )
        self.model_info = Gauge(
            "monofacet_model_info",
            "Always 1; the labels say what is served.",
            ["bundle", "sha256", "device"],
            registry=r,
        )
