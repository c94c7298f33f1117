"""What callers lose when the server is told to stop, and when an encoder is killed: `python -m benchmarks.stopping`.

SIGTERM goes to the server while callers and streams are busy: of the calls that were in flight, how many fail.
SIGKILL goes to the encoder's replica while clients with their ordinary retries call: how many calls fail, and how
long until the first answer. Prints one table and writes out/bench/stopping.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import monofacet
import psutil
import typer
from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from tests.support.service import STOP_TIMEOUT_S, Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
# A call begun this long before the signal has reached the server; a later one may be on its way to it.
_ARRIVED_S = 0.1


async def terminated(service: Service, callers: int, streams: int, seconds: float) -> dict[str, Any]:
    """Send SIGTERM under load; return what became of the calls in flight."""
    calls: list[tuple[float, float, bool]] = []
    streamed: list[tuple[int, int]] = []
    signalled = float("inf")
    async with aio.insecure_channel(service.target) as channel:
        stub: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)
        request = pb.EncodeRequest(inputs=[common.Input(text=f"a picture of {n} things") for n in range(4)])

        async def caller() -> None:
            while time.perf_counter() < signalled:
                began = time.perf_counter()
                try:
                    await stub.Encode(request, timeout=60)
                    good = True
                except aio.AioRpcError:
                    good = False
                calls.append((began, time.perf_counter(), good))

        async def stream() -> None:
            sent = received = 0

            async def requests() -> AsyncIterator[pb.StreamEncodeRequest]:
                nonlocal sent
                # On for half a second after the signal: what was begun is finished, whatever is still to be sent.
                while time.perf_counter() < signalled + 0.5:
                    yield pb.StreamEncodeRequest(item=pb.StreamItem(input=common.Input(text=f"text {sent}")))
                    sent += 1
                    await asyncio.sleep(0.02)

            try:
                async for _ in stub.StreamEncode(requests(), timeout=120):
                    received += 1
            except aio.AioRpcError:
                pass
            streamed.append((sent, received))

        busy = [asyncio.create_task(caller()) for _ in range(callers)]
        busy += [asyncio.create_task(stream()) for _ in range(streams)]
        await asyncio.sleep(seconds)
        service.process.send_signal(signal.SIGTERM)
        signalled = time.perf_counter()
        await asyncio.gather(*busy)
    code = await asyncio.to_thread(service.process.wait, STOP_TIMEOUT_S)
    flying = [good for began, ended, good in calls if began < signalled - _ARRIVED_S and ended > signalled]
    # Callers stop at the signal, so hardly any call is that old; the later ones count apart.
    late = [good for began, ended, good in calls if signalled - _ARRIVED_S <= began < signalled < ended]
    return {
        "unary_in_flight": len(flying),
        "unary_lost": flying.count(False),
        "unary_begun_in_the_last_0.1_s": len(late),
        "of_those_refused": late.count(False),
        "stream_items": sum(sent for sent, _ in streamed),
        "stream_items_lost": sum(sent - received for sent, received in streamed),
        "exit_code": code,
        "seconds_to_exit": round(time.perf_counter() - signalled, 1),
    }


def encoder_of(service: Service) -> int:
    """Return the process id of the encoder's replica."""
    for pid in service.descendants():
        try:
            if "monofacet:encoder" in " ".join(psutil.Process(pid).cmdline()):
                return pid
        except psutil.Error:
            continue
    raise RuntimeError("no encoder among the service's processes")


async def killed(service: Service, callers: int, seconds: float) -> dict[str, Any]:
    """Kill the encoder under load; return what the clients saw."""
    calls: list[tuple[float, float, str]] = []
    until = time.perf_counter() + 600
    failed: list[str] = []
    async with monofacet.AsyncClient(service.target, timeout=180, max_in_flight=callers) as client:

        async def caller() -> None:
            while time.perf_counter() < until:
                began = time.perf_counter()
                try:
                    await client.encode(["a red heart", "a blue heart"])
                    wrong = ""
                except monofacet.MonofacetError as error:
                    wrong = str(error)
                    failed.append(wrong)
                calls.append((began, time.perf_counter(), wrong))

        busy = [asyncio.create_task(caller()) for _ in range(callers)]
        await asyncio.sleep(seconds)
        os.kill(encoder_of(service), signal.SIGKILL)
        died = time.perf_counter()
        while not any(began > died and not wrong for began, _, wrong in calls):
            await asyncio.sleep(0.05)
            if time.perf_counter() > died + 240:
                break
        until = time.perf_counter() + seconds
        await asyncio.gather(*busy)
    back = min((ended for _, ended, wrong in calls if ended > died + 0.5 and not wrong), default=float("nan"))
    return {
        "calls": len(calls),
        "calls_failed": len(failed),
        "first_failure": failed[0] if failed else "",
        "recovery_s": round(back - died, 1),
        "longest_call_s": round(max(ended - began for began, ended, _ in calls), 1),
    }


def main(
    seconds: Annotated[float, typer.Option(help="Under load before each signal, and after.")] = 5.0,
    callers: Annotated[int, typer.Option(help="Unary callers.")] = 16,
    streams: Annotated[int, typer.Option(help="Streams.")] = 4,
    bundle: Annotated[Path, typer.Option(help="What is served.")] = EMBEDDED_BUNDLE,
) -> None:
    """Signal a server of its own, twice."""
    OUT.mkdir(parents=True, exist_ok=True)
    service = start_service(bundle, OUT / "stopping.log")
    try:
        kill = asyncio.run(killed(service, callers, seconds))
        term = asyncio.run(terminated(service, callers, streams, seconds))
    finally:
        service.stop()
    report = {"sigkill_of_the_encoder": kill, "sigterm": term}
    document = {"bundle": Bundle.load(bundle, verify=False).id, **report}
    (OUT / "stopping.json").write_text(json.dumps(document, indent=1) + "\n")
    table = Table("signal", "figure", "value")
    for name, metrics in report.items():
        for key, value in metrics.items():
            table.add_row(name, key.replace("_", " "), str(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
