"""Four times as many calls as the server can answer, and a bulk caller beside single ones.

`python -m benchmarks.overload [--seconds 20] [--factor 4]`

Capacity is what 16 callers get in a closed loop. Then calls begin at random moments: at a tenth and half of the
capacity, at `factor` times the capacity, and at half again, to see whether the server is as before. Fairness:
singles at 2 a second, alone and beside two callers that send 256 images again and again, who also run alone. Prints
one table, in which the load generator's own delay is told apart, and writes out/bench/overload.json.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.openloop import Outcome, closed_loop, open_loop
from benchmarks.samples import jpegs
from deployments.operations.settings import EMBEDDED_BUNDLE
from tests.support.service import start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
Call = Callable[[], Awaitable[Any]]


def encoder(channel: aio.Channel, images: int) -> Call:
    """Return a call that encodes so many images, others each time."""
    stub: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)
    inputs = [common.Input(image=common.Image(data=data)) for data in jpegs(64)]
    turn = itertools.count()

    def call() -> Awaitable[Any]:
        start = next(turn) * images
        chosen = [inputs[(start + i) % len(inputs)] for i in range(images)]
        answer: Awaitable[Any] = stub.Encode(pb.EncodeRequest(inputs=chosen), timeout=120)
        return answer

    return call


async def overload(target: str, seconds: float, factor: float) -> dict[str, Outcome]:
    """Return the outcome of each load, by what it was."""
    async with aio.insecure_channel(target) as channel:
        single, bulk = encoder(channel, 1), encoder(channel, 256)
        await closed_loop(single, 16, min(5.0, seconds))
        loads = {"capacity": await closed_loop(single, 16, seconds)}
        capacity = len(loads["capacity"].latencies) / loads["capacity"].seconds
        for name, share in (
            ("a tenth of capacity", 0.1),
            ("half of capacity", 0.5),
            (f"{factor:g} x capacity", factor),
            ("half, after overload", 0.5),
        ):
            loads[name] = await open_loop(single, share * capacity, seconds)
        loads["singles alone"] = await open_loop(single, 2.0, seconds)
        loads["bulk alone (calls of 256)"] = await closed_loop(bulk, 2, seconds)
        busy = asyncio.create_task(closed_loop(bulk, 2, seconds + 2))
        await asyncio.sleep(2)
        loads["singles beside bulk"] = await open_loop(single, 2.0, seconds)
        loads["bulk beside singles (calls of 256)"] = await busy
        return loads


def main(
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 20.0,
    factor: Annotated[float, typer.Option(help="Calls begun over calls that can be answered.")] = 4.0,
    bundle: Annotated[Path, typer.Option(help="What is served.")] = EMBEDDED_BUNDLE,
) -> None:
    """Overload a server of its own."""
    OUT.mkdir(parents=True, exist_ok=True)
    service = start_service(bundle, OUT / "overload.log", ["--log-level", "warning"])
    try:
        loads = asyncio.run(overload(service.target, seconds, factor))
    finally:
        service.stop()
    metrics = {name: outcome.metrics() for name, outcome in loads.items()}
    over = metrics[f"{factor:g} x capacity"]
    refused = over["codes"].get("RESOURCE_EXHAUSTED", 0)
    bulk = metrics["bulk beside singles (calls of 256)"]["answered_per_s"]
    summary = {
        "capacity_per_s": metrics["capacity"]["answered_per_s"],
        "answered_share_of_capacity": over["answered_per_s"] / metrics["capacity"]["answered_per_s"],
        "neither_answered_nor_shed": over["calls"] - over["codes"].get("OK", 0) - refused,
        "shed_without_retry_info": refused - over["refused_with_retry_info"],
        "p99_over_tenth": over["p99_ms"] / metrics["a tenth of capacity"]["p99_ms"],
        "p99_over_half": over["p99_ms"] / metrics["half of capacity"]["p99_ms"],
        "p99_over_capacity": over["p99_ms"] / metrics["capacity"]["p99_ms"],
        "p99_after_over_before": metrics["half, after overload"]["p99_ms"]
        / metrics["half of capacity"]["p99_ms"],
        "singles_p95_beside_bulk_over_alone": metrics["singles beside bulk"]["p95_ms"]
        / metrics["singles alone"]["p95_ms"],
        "bulk_kept_beside_singles": bulk / metrics["bulk alone (calls of 256)"]["answered_per_s"],
    }
    (OUT / "overload.json").write_text(json.dumps({"loads": metrics, "summary": summary}, indent=1) + "\n")
    table = Table(
        "load", "calls", "answered/s", "p50 ms", "p95 ms", "p99 ms", "late ms", "codes", "RetryInfo"
    )
    for name, row in metrics.items():
        codes = ", ".join(f"{code} {count}" for code, count in row["codes"].items())
        numbers = [row["calls"], row["answered_per_s"], row["p50_ms"], row["p95_ms"], row["p99_ms"]]
        numbers.append(row["begun_late_p99_ms"])
        table.add_row(name, *map(str, numbers), codes, str(row["refused_with_retry_info"]))
    Console(width=150).print(table)
    for key, value in summary.items():
        print(f"{key}: {value:.3g}")


if __name__ == "__main__":
    typer.run(main)
