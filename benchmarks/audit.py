"""What an audit of a long stream costs the server in memory and time: one table, and out/bench/audit.json.

`python -m benchmarks.audit [--items 10000]`

One AuditGender stream of pictures, some of them broken and skipped. The memory of every process of the service is
read before, while the stream runs and while the audit is computed; the growth is put beside what the settings promise.
Then the same stream with a deadline that it cannot meet: how late the caller hears of it, and how soon the place of
that audit is free again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import monofacet
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.samples import jpegs
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from services.encoding.machine import usable_cores
from tests.support.service import Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
GENDERS = ("woman", "man", None)
# One of so many items is no picture.
BROKEN_EVERY = 500


def memory(service: Service) -> dict[str, float]:
    """Return the resident memory of the gateway and of the encoder, MB, by the names that Serve gives them."""
    found: dict[str, float] = {}
    for pid in service.descendants():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
        for name in ("gateway", "encoder"):
            if f"ServeReplica:monofacet:{name}" in title:
                found[name] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return found


class Watch:
    """Keeps the highest memory of each process while it runs."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._done = threading.Event()
        self.highest: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.2):
            for name, size in memory(self._service).items():
                self.highest[name] = max(self.highest.get(name, 0.0), size)


def items(count: int, files: list[bytes]) -> Iterator[monofacet.LabelledItem]:
    """Yield labelled pictures; every `BROKEN_EVERY`-th is broken."""
    for i in range(count):
        data = b"no picture" if i % BROKEN_EVERY == BROKEN_EVERY - 1 else files[i % len(files)]
        yield monofacet.LabelledItem(
            data, GENDERS[i % 3], f"profession {i % 20}", f"cluster {i % 400}", f"item {i}"
        )


def measure(service: Service, count: int) -> dict[str, Any]:
    """Run both streams and return the figures."""
    files = jpegs(64)
    settings = monofacet.AuditSettings(skip_bad_items=True)
    with monofacet.Client(service.target) as client:
        # Until the gateway's arrays and threads are there, so that growth is the stream's.
        client.audit_gender(items(64, files), settings)
        before = memory(service)
        with Watch(service) as watch:
            sent: list[float] = []

            def counted() -> Iterator[monofacet.LabelledItem]:
                yield from items(count, files)
                sent.append(time.perf_counter())

            began = time.perf_counter()
            result = client.audit_gender(counted(), settings)
            stream_s, whole_s = sent[0] - began, time.perf_counter() - began
        deadline = stream_s / 2
        began = time.perf_counter()
        try:
            client.audit_gender(items(count, files), settings, timeout=deadline)
            late = float("nan")
        except monofacet.DeadlineError:
            late = time.perf_counter() - began - deadline
        began = time.perf_counter()
        client.audit_gender(items(64, files), settings)
        after_deadline = time.perf_counter() - began
    return {
        "items": count,
        "skipped": result.skipped,
        "named": [item.index for item in result.skipped_items][:3],
        "items_per_s": count / stream_s,
        "computed_s": whole_s - stream_s,
        "memory_before_mb": before,
        "memory_highest_mb": watch.highest,
        "growth_mb": {name: watch.highest.get(name, 0.0) - size for name, size in before.items()},
        "deadline_s": deadline,
        "told_after_deadline_s": late,
        "next_audit_s": after_deadline,
    }


def main(
    count: Annotated[int, typer.Option("--items", min=1000, max=20_000)] = 10_000,
    bundle: Annotated[Path, typer.Option()] = EMBEDDED_BUNDLE,
) -> None:
    """Measure, print a table and write the JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    service = start_service(bundle, OUT / "audit.log")
    try:
        metrics = measure(service, count)
    finally:
        service.stop()
    table = Table("", "value", title=f"AuditGender, {count} pictures")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), json.dumps(value))
    Console().print(table)
    document = {"cores": usable_cores(), "load": os.getloadavg()[0],
                "bundle": Bundle.load(bundle, verify=False).id, **metrics}  # fmt: skip
    (OUT / "audit.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
