"""What an honest caller notices of a hostile one: `python -m benchmarks.hostile`.

With one token and from one process, for some seconds and on the loopback interface alone: 512 streams that send
nothing, 100 half-sent requests of 32 MiB, 50 health watchers that take no answer and send names of 4 MiB, 10,000
streams that are reset as soon as they are open, and 100 JPEGs of 400 scans. Beside them another token encodes a text
and a picture, one call after the other. Prints its latencies alone and beside all that, the memory of every process,
and how long the server took to stop; writes out/bench/hostile.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import PIL.Image
import psutil
import typer
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from deployments.access.scopes import Scope
from deployments.access.tokens import new_token
from deployments.operations.limits import MIB
from deployments.operations.settings import EMBEDDED_BUNDLE
from tests.support.http2 import Raw, message
from tests.support.service import Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
ENCODE = "/monofacet.v1.FeatureService/Encode"
STREAM = "/monofacet.v1.FeatureService/StreamEncode"
WATCH = "/grpc.health.v1.Health/Watch"
SILENT, HALF_SENT, WATCHERS, RESETS, SCANS = 512, 100, 50, 10_000, 100
# Another address of this machine, for what is counted by address.
STRANGER = "127.0.0.2"


def many_scans(scans: int = 400, side: int = 6_300) -> bytes:
    """Return a grey progressive JPEG of about 100 KB whose every scan goes over all of its pixels."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    def bits(text: str) -> bytes:
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")

    blocks = (-(-side // 8)) ** 2
    runs, left = "", blocks
    while left > 0:
        # A run of 2^14 blocks and more is a code of one bit, and 14 bits of length.
        run = max(min(left, 32_767), 16_384)
        runs += "0" + format(run - 16_384, "014b")
        left -= run
    empty = bits(runs)
    parts = [
        b"\xff\xd8",
        segment(0xDB, bytes([0, *[1] * 64])),
        segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])),
        segment(0xC4, bytes([0x00, 1, *[0] * 15, 0])),
        segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0])),
        segment(0xDA, bytes([1, 1, 0, 0, 0, 0x00])) + bits("0" * blocks),
        segment(0xDA, bytes([1, 1, 0, 1, 63, 0x01])) + empty,
        (segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + empty) * scans,
        b"\xff\xd9",
    ]
    return b"".join(parts)


def attack(port: int, token: str, begun: Any, over: Any) -> None:
    """Do all of it at once, and hold what can be held until it is over."""
    held: list[Raw] = []

    def silent() -> None:
        for _ in range(SILENT // 64):
            held.append(raw := Raw(port, STRANGER))
            for _ in range(64):
                raw.open(STREAM, token)

    def half_sent() -> None:
        data = message(32 * MIB, bytes(31 * MIB))
        for _ in range(HALF_SENT // 25):
            held.append(raw := Raw(port, STRANGER))
            for _ in range(25):
                raw.send(raw.open(ENCODE, token), data, seconds=0.1)

    def watch() -> None:
        held.append(raw := Raw(port, STRANGER, window=0))
        name = bytes(4 * MIB)
        for _ in range(WATCHERS):
            raw.send(raw.open(WATCH), message(len(name), name), seconds=0.1)

    def reset() -> None:
        held.append(raw := Raw(port, STRANGER))
        raw.reset_many(ENCODE, RESETS, token)

    def decode() -> None:
        request = pb.EncodeRequest(inputs=[common.Input(image=common.Image(data=many_scans()))])
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            encode = feature_service_pb2_grpc.FeatureServiceStub(channel).Encode
            calls = [
                encode.future(request, timeout=60, metadata=(("authorization", f"Bearer {token}"),))
                for _ in range(SCANS)
            ]
            print("scans:", dict(Counter(call.code().name for call in calls)), flush=True)

    def tolerant(part: Any) -> None:
        # Whatever the server does about it is the server's right.
        with contextlib.suppress(Exception):
            part()

    threads = [
        threading.Thread(target=tolerant, args=(part,)) for part in (silent, half_sent, watch, reset, decode)
    ]
    for thread in threads:
        thread.start()
    begun.set()
    over.wait(600)
    for raw in held:
        raw.socket.close()


def honest(port: int, token: str, until: Any) -> tuple[list[float], Counter[str]]:
    """Encode a text and a picture in turn; return the latencies (s) and what came of the calls."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    PIL.Image.fromarray(noise).save(file, "JPEG")
    inputs = [common.Input(text="a red heart"), common.Input(image=common.Image(data=file.getvalue()))]
    latencies, codes = [], Counter[str]()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = feature_service_pb2_grpc.FeatureServiceStub(channel)
        while not until():
            began = time.perf_counter()
            try:
                request = pb.EncodeRequest(inputs=[inputs[len(latencies) % 2]])
                stub.Encode(request, timeout=60, metadata=(("authorization", f"Bearer {token}"),))
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1
            latencies.append(time.perf_counter() - began)
    return latencies, codes


@contextlib.contextmanager
def watched_memory(service: Service) -> Iterator[dict[str, list[float]]]:
    """Measure the memory (MiB) of every process of the service: of each its first and its largest."""
    seen: dict[str, list[float]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in (pid for pid in [service.process.pid, *service.descendants()]):
                with contextlib.suppress(psutil.Error):
                    one = psutil.Process(process)
                    name = " ".join(one.cmdline()[:1])[-40:] or one.name()
                    mib = one.memory_info().rss / MIB
                    first, most = seen.get(f"{name} {process}", [mib, mib])
                    seen[f"{name} {process}"] = [first, max(most, mib)]

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def quantiles(latencies: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return {"calls": len(latencies), "p50": float(p50), "p99": float(p99), "max": max(latencies)}


def main(
    seconds: Annotated[float, typer.Option(help="Seconds of each of the two measurements.")] = 20.0,
) -> None:
    console = Console()
    good, good_line = new_token("honest", frozenset([Scope.READ]), None)
    bad, bad_line = new_token("hostile", frozenset([Scope.READ]), None)
    context = multiprocessing.get_context("spawn")
    begun, over = context.Event(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        tokens = {"MONOFACET_TOKENS": f"{good_line};{bad_line}", "MONOFACET_LOG_LEVEL": "error"}
        service = start_service(EMBEDDED_BUNDLE, Path(folder) / "log", environment=tokens)
        port = int(service.target.rsplit(":", 1)[1])
        hostile = context.Process(target=attack, args=(port, bad, begun, over), daemon=True)
        try:
            end = time.monotonic() + seconds
            alone, _ = honest(port, good, lambda: time.monotonic() > end)
            before = service.descendants()
            with watched_memory(service) as memory:
                hostile.start()
                begun.wait(60)
                end = time.monotonic() + seconds
                beside, codes = honest(port, good, lambda: time.monotonic() > end)
                dead = before - service.descendants()
            began = time.monotonic()
            code = service.stop()
            stop_s = time.monotonic() - began
        finally:
            over.set()
            service.stop()
            if hostile.pid is not None:
                hostile.join(30)
    result = {
        "alone": quantiles(alone),
        "beside": quantiles(beside),
        "codes": dict(codes),
        "memory_mib": {name: {"first": first, "most": most} for name, (first, most) in memory.items()},
        "dead": len(dead),
        "exit_code": code,
        "stop_s": stop_s,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "hostile.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("honest caller", "calls", "p50", "p99", "longest")
    for name in ("alone", "beside"):
        found: Any = result[name]
        table.add_row(
            name, f"{found['calls']}", *(f"{found[key] * 1e3:.1f} ms" for key in ("p50", "p99", "max"))
        )
    console.print(table)
    p99s = [result[name]["p99"] for name in ("beside", "alone")]  # type: ignore[index]
    console.print(
        f"p99 x {p99s[0] / p99s[1]:.1f}; {dict(codes)}; {len(dead)} dead; stopped in {stop_s:.1f} s ({code})"
    )
    grown = sorted(memory.items(), key=lambda one: one[1][0] - one[1][1])[:6]
    table = Table("process", "MiB before", "most")
    for name, (first, most) in grown:
        table.add_row(name, f"{first:.0f}", f"{most:.0f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
