"""How long the server takes to start, phase by phase, and what memory it then holds: `python -m benchmarks.start`.

Starts `monofacet serve` a few times on the embedded bundle, each time from nothing but a warm page cache, and asks its
health service until it says SERVING, for the whole server and for images. Phases are the times of the server's own log
lines. CPU time is that of all its processes together, which a busy machine stretches less than the wall clock. Memory
is proportional (PSS: what processes share is counted once), after one call of each kind. Prints tables and writes
out/bench/start.json.

With `--busy` other work, two loops at niceness 0 on every core, runs beside each start; what counts then is how many of
the starts get to SERVING, which is written to out/bench/start_busy.json.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet import Client
from rich.console import Console
from rich.table import Table

from deployments.gateway.services import IMAGING
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from services.encoding.machine import usable_cores
from tests.support.service import Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
START_TARGET_S = 20.0
MEMORY_TARGET_MB = 2500.0
KINDS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Seconds in which a server of this size must have begun to generate.
_PATIENCE_S = 300.0
# Until the gateway listens there is nothing to ask; its line says where.
LISTENING = re.compile(r"monofacet: ready: (?P<bundle>\S+) on (?P<target>\S+), metrics on (?P<metrics>\S+),")


def name_of(pid: int) -> str:
    """Return what a process is: Ray's titles for its workers, a program's or a script's name for others."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    title = words[0].split()[0] if words[0] else "?"
    if "::" in title:
        return title.removeprefix("ray::").removeprefix("ServeReplica:")
    scripts = [Path(word).stem for word in words if word.endswith(".py")]
    if scripts:
        return f"ray's {scripts[0]}" if scripts[0] != "main" else f"ray's {Path(words[2]).parent.name}"
    return "command" if "serve" in words else Path(title).name


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) * _TICK_S


def memory_mb(pid: int) -> dict[str, float]:
    """Return the proportional memory of a process, megabytes, by kind."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    return {kind: int(found[kind]) / 1024 for kind in KINDS}


def of_each(service: Service, measure: Any) -> dict[str, Any]:
    """Return what `measure` says of each process of the service, by name; those of one name are numbered."""
    measured: dict[str, Any] = {}
    for pid in sorted({service.process.pid, *service.descendants()}):
        try:
            name, value = name_of(pid), measure(pid)
        except OSError:
            # It has ended meanwhile.
            continue
        measured[f"{name} ({pid})" if name in measured else name] = value
    return measured


def serving_s(target: str, name: str, began: float) -> float:
    """Return the seconds from `began` until a service says SERVING."""
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while time.time() < began + _PATIENCE_S:
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return time.time() - began
            time.sleep(0.02)
    raise RuntimeError(f"{name or 'the server'} does not serve")


def phases(log: Path, began: float) -> dict[str, float]:
    """Return the seconds from `began` to each line that the server logged of its own accord."""
    found: dict[str, float] = {}
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        when = datetime.fromisoformat(entry["timestamp"]).timestamp()
        found.setdefault(f"{entry['process']}: {entry['event']}", when - began)
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def once(bundle: Path, log: Path, generates: bool) -> dict[str, Any]:
    """Start the server, wait, use it, measure it and stop it."""
    began = time.time()
    service = start_service(bundle, log, ["--log-format", "json"], until=LISTENING)
    try:
        times = {"serving": serving_s(service.target, "", began)}
        if generates:
            times["generating"] = serving_s(service.target, IMAGING, began)
        cpu = of_each(service, cpu_s)
        timeline = phases(log, began)
        idle = of_each(service, memory_mb)
        sample = bundle / Bundle.load(bundle, verify=False).manifest.samples[0].path
        with Client(service.target) as client:
            client.encode([sample, "a red heart"], dictionary="")
            client.features_page(page_size=10)
            if generates:
                client.generate("a red heart", seeds=1)
        used = of_each(service, memory_mb)
    finally:
        service.stop()
    return {"times": times, "phases": timeline, "cpu": cpu, "memory_idle": idle, "memory": used}


@contextmanager
def busy_cores(loops: int) -> Iterator[None]:
    """Run loops that take all the time they get, for the length of the block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for loop in running:
            loop.kill()
            loop.wait()


def beside_other_work(bundle: Path, times: int) -> dict[str, Any]:
    """Start the server beside loops on every core; return how each start went."""
    loops = 2 * len(os.sched_getaffinity(0))
    runs: list[dict[str, Any]] = []
    with busy_cores(loops):
        for attempt in range(times):
            began = time.time()
            log = OUT / f"start_busy-{attempt}.log"
            wrong, seconds, code = "", 0.0, 0
            try:
                service = start_service(bundle, log, ["--log-format", "json"], until=LISTENING)
                try:
                    seconds = serving_s(service.target, "", began)
                finally:
                    code = service.stop()
            except RuntimeError as error:
                wrong = str(error).strip().splitlines()[-1]
            lines = [line for line in log.read_text().splitlines() if line.startswith("monofacet: ")]
            again = sum("starting again" in line for line in lines)
            runs.append({"s": seconds, "started_again": again, "exit_code": code, "wrong": wrong})
            print(f"start {attempt + 1} of {times}: {runs[-1]}", flush=True)
    return {"loops": loops, "cores": len(os.sched_getaffinity(0)), "runs": runs}


def total(memory: dict[str, dict[str, float]], kind: str = "Pss") -> float:
    """Return the memory of all processes, megabytes."""
    return sum(values[kind] for values in memory.values())


def main(
    times: Annotated[int, typer.Option(help="Starts.", min=1)] = 3,
    bundle: Annotated[Path, typer.Option(help="What is served.")] = EMBEDDED_BUNDLE,
    busy: Annotated[bool, typer.Option("--busy", help="Beside other work on every core.")] = False,
) -> None:
    """Start, measure, print and write."""
    OUT.mkdir(parents=True, exist_ok=True)
    if busy:
        found = beside_other_work(bundle, times)
        (OUT / "start_busy.json").write_text(json.dumps(found, indent=1) + "\n")
        good = [run["s"] for run in found["runs"] if not run["wrong"] and run["exit_code"] == 0]
        print(
            f"{len(good)} of {times} started and stopped; {statistics.median(good or [0]):.0f} s to SERVING"
        )
        raise typer.Exit(len(good) != times)
    # Reads every file, so that each start finds the same warm cache.
    loaded = Bundle.load(bundle)
    generates = loaded.manifest.diffusion is not None
    runs = [once(bundle, OUT / "start.log", generates) for _ in range(times)]
    last = runs[-1]

    def median(of: Any) -> float:
        return statistics.median(map(of, runs))

    metrics = {
        **{f"to {name}, s": median(lambda run, n=name: run["times"][n]) for name in last["times"]},
        "CPU to generating, s" if generates else "CPU to serving, s": median(
            lambda run: sum(run["cpu"].values())
        ),
        "memory at first, MB": median(lambda run: total(run["memory_idle"])),
        "memory after calls, MB": median(lambda run: total(run["memory"])),
        "processes": median(lambda run: len(run["memory"])),
    }
    targets = {
        "to serving, s": START_TARGET_S,
        "to generating, s": START_TARGET_S,
        "memory after calls, MB": MEMORY_TARGET_MB,
    }
    console = Console()
    table = Table("figure", "median", "target")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.1f}", f"<= {targets[name]:g}" if name in targets else "")
    console.print(table)
    table = Table("s", "phase (of the last start)")
    for name, value in last["phases"].items():
        table.add_row(f"{value:.1f}", name)
    console.print(table)
    table = Table("process (of the last start)", "CPU s", "PSS MB", "of it private", "files", "shared memory")
    for name, memory in sorted(last["memory"].items(), key=lambda pair: -pair[1]["Pss"]):
        table.add_row(name, f"{last['cpu'].get(name, 0):.1f}", *(f"{memory[kind]:.0f}" for kind in KINDS))
    console.print(table)
    document = {
        "bundle": loaded.id,
        "figures": metrics,
        "targets": targets,
        "cores": usable_cores(),
        "runs": runs,
    }
    (OUT / "start.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
