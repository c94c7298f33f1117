"""What HTTP costs: embeddings by JSON and by Connect's binary form against gRPC, in one run on one server.

`python -m benchmarks.http [--callers 32] [--seconds 4] [--rounds 5]` writes out/bench/http.json.

Every round measures each way in turn, with so many callers that each have one picture in progress; a ratio is that of
one round, and its median over the rounds is reported. The callers run in a process of their own a way, since one
process cannot make as many calls in Python as a server answers on as many cores.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import httpx2
import typer
from grpc import aio
from monofacet.v1 import common_pb2, feature_service_pb2, feature_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.samples import jpegs
from deployments.operations.settings import EMBEDDED_BUNDLE
from tests.support.service import start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
ROUTE = "/monofacet.v1.FeatureService/Encode"
# Way -> the least part of gRPC's throughput that it should reach.
TARGETS = {"grpc": 1.0, "connect": 0.95, "json": 0.85, "openai": 0.85}
Call = Callable[[], Awaitable[None]]


async def _rate(call: Call, callers: int, seconds: float) -> float:
    """Return the calls a second of so many callers, after a second that does not count."""
    done = 0

    async def keep_calling() -> None:
        nonlocal done
        while True:
            await call()
            done += 1

    tasks = [asyncio.create_task(keep_calling()) for _ in range(callers)]
    await asyncio.sleep(1.0)
    before, began = done, time.perf_counter()
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    rate = (done - before) / (time.perf_counter() - began)
    failed = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in failed:
        task.result()
    return rate


async def _measure(way: str, target: str, http_url: str, callers: int, seconds: float) -> float:
    image = jpegs(1)[0]
    request = feature_service_pb2.EncodeRequest(inputs=[common_pb2.Input(image=common_pb2.Image(data=image))])
    if way == "grpc":
        async with aio.insecure_channel(target) as channel:
            stub = feature_service_pb2_grpc.FeatureServiceStub(channel)

            async def call() -> None:
                await stub.Encode(request)

            return await _rate(call, callers, seconds)
    coded = base64.b64encode(image).decode()
    bodies = {
        "connect": (ROUTE, "application/proto", request.SerializeToString()),
        "json": (ROUTE, "application/json", json.dumps({"inputs": [{"image": {"data": coded}}]}).encode()),
        "openai": ("/v1/embeddings", "application/json", json.dumps({"input": {"image": coded}}).encode()),
    }
    route, kind, body = bodies[way]
    limits = httpx2.Limits(max_connections=callers, max_keepalive_connections=callers)
    async with httpx2.AsyncClient(base_url=http_url, limits=limits, timeout=60, trust_env=False) as client:

        async def post() -> None:
            response = await client.post(route, content=body, headers={"content-type": kind})
            response.raise_for_status()

        return await _rate(post, callers, seconds)


def main(
    callers: Annotated[int, typer.Option(help="Pictures in progress.")] = 32,
    seconds: Annotated[float, typer.Option(help="Of one measurement.")] = 4.0,
    rounds: Annotated[int, typer.Option(help="Of all ways in turn.")] = 5,
    one: Annotated[str, typer.Option(hidden=True, help="WAY TARGET URL: measure one way and print it.")] = "",
) -> None:
    """Measure all ways, print the table and write it."""
    if one:
        way, target, url = one.split()
        print(asyncio.run(_measure(way, target, url, callers, seconds)))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    service = start_service(EMBEDDED_BUNDLE, OUT / "http.log", environment={"MONOFACET_MAX_QUEUE_S": "60"})
    rates: dict[str, list[float]] = {way: [] for way in TARGETS}
    try:
        for i in range(rounds):
            # Another order each round, so that no way always comes after the same one.
            ways = list(TARGETS)[i % len(TARGETS) :] + list(TARGETS)[: i % len(TARGETS)]
            for way in ways:
                command = [
                    sys.executable, "-m", "benchmarks.http", "--callers", str(callers), "--seconds", str(seconds),
                    "--one", f"{way} {service.target} {service.http_url}",
                ]  # fmt: skip
                done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
                rates[way].append(float(done.stdout))
    finally:
        service.stop()
    table = Table("way", "calls a second", "of gRPC's", "range", "target")
    written = {}
    for way, target in TARGETS.items():
        ratios = [rate / base for rate, base in zip(rates[way], rates["grpc"], strict=True)]
        ratio = statistics.median(ratios)
        written[way] = {"rates": rates[way], "ratio": ratio, "target": target}
        table.add_row(
            way, f"{statistics.median(rates[way]):.0f}", f"{ratio:.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{target:.2f}",
        )  # fmt: skip
    (OUT / "http.json").write_text(json.dumps({"callers": callers, "ways": written}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
