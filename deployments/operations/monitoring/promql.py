"""PromQL from rows of the metrics table: a name or a label that the table lacks cannot be written."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram

from deployments.operations.metrics import Row

# A label that Prometheus adds to each target; every release has its own.
JOB = "job"


def select(row: Row[Any], suffix: str = "", **matchers: str) -> str:
    """Return a selector of the row's series.

    Parameters
    ----------
    row
        Of the table.
    suffix
        `_bucket`, `_sum` or `_count` of a histogram.
    matchers
        By label: operator and quoted value, as in `code='!="OK"'`.

    Raises
    ------
    ValueError
        For a label that the row has not, and for a suffix that its kind has not.
    """
    if (suffix != "") is not (row.kind is Histogram):
        raise ValueError(f"{row.name} has no series {row.name}{suffix}")
    _check(row, matchers)
    inside = ",".join(f"{label}{matcher}" for label, matcher in matchers.items())
    return f"{row.name}{suffix}{{{inside}}}" if inside else f"{row.name}{suffix}"


def _summed(
    function: str, row: Row[Any], window: str, by: tuple[str, ...], suffix: str = "", **matchers: str
) -> str:
    if row.kind not in (Counter, Histogram):
        raise ValueError(f"{row.name} does not only grow")
    _check(row, by)
    return f"sum by ({', '.join(by)}) ({function}({select(row, suffix, **matchers)}[{window}]))"


def rate(row: Row[Any], window: str, by: tuple[str, ...] = (JOB,), suffix: str = "", **matchers: str) -> str:
    """Return the summed rate (1/s) of a counter, or of one series of a histogram, over `window`."""
    return _summed("rate", row, window, by, suffix, **matchers)


def increase(row: Row[Any], window: str, by: tuple[str, ...] = (JOB,), **matchers: str) -> str:
    """Return how much a counter grew over `window`."""
    return _summed("increase", row, window, by, **matchers)


def calls(row: Row[Any], window: str, by: tuple[str, ...] = (JOB,), **matchers: str) -> str:
    """Return the observations a second of a histogram."""
    return rate(row, window, by, "_count", **matchers)


def quantile(q: float, row: Row[Any], window: str, by: tuple[str, ...] = (JOB,), **matchers: str) -> str:
    """Return the `q` quantile of a histogram over `window`, in its unit."""
    return f"histogram_quantile({q}, {rate(row, window, ('le', *by), '_bucket', **matchers)})"


def mean(row: Row[Any], window: str, by: tuple[str, ...] = (JOB,), **matchers: str) -> str:
    """Return the mean of a histogram's observations over `window`."""
    return f"{rate(row, window, by, '_sum', **matchers)} / {rate(row, window, by, '_count', **matchers)}"


def _check(row: Row[Any], labels: Any) -> None:
    unknown = set(labels) - set(row.labels) - {JOB, "instance", "le"}
    if unknown:
        raise ValueError(f"{row.name} has no label {', '.join(sorted(unknown))}")
