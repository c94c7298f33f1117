"""Monofacet against its peers, with the same ViT-B-32: a table, out/bench/peers.json and out/bench/peers.png.

`python -m benchmarks.peers --setup` makes the peers' environments (out/peers, some 12 GB with PyPI's torch), and then
`python -m benchmarks.peers [--rounds 3] [--seconds 15] [--only monofacet,fastapi]` measures.

The peers are LitServe, infinity-emb and a plain FastAPI loop around torch, each with the settings that its
documentation speaks of; where there are several, a first short round at 32 callers chooses. Then rounds: one server
at a time on an idle machine, each of them in every round, all loads by the same generator with the same JPEG files of
224 px. Each is first shown to serve the very weights. Ratios are of one round, and medians over rounds.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

# Before torch is imported: two busy processes that spin while they wait would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.console import Console

from benchmarks.peers import environments
from benchmarks.peers.measure import SCENARIOS, ceiling, describe, reference, visit
from benchmarks.peers.report import plot, summary, table
from benchmarks.peers.servers import Contender, contenders
from benchmarks.peers.weights import TOLERANCE, difference, write_transformers
from benchmarks.pictures import write_pictures
from benchmarks.samples import jpegs, vit_b_32
from deployments.operations.settings import Settings

OUT = environments.ROOT / "out" / "bench"
CHECKED = 4

Visits = dict[str, list[dict[str, Any]]]


def processor() -> str:
    """Return the processor's name and what of its instruction sets matters here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(found)})"


def choose(found: list[Contender], tried: Visits) -> list[Contender]:
    """Return the faster contender of each peer, at 32 callers; the only one where there is no choice."""
    best: dict[str, Contender] = {}
    for contender in found:
        runs = tried.get(contender.name)
        rate = runs[0]["32x1"]["images_per_s"] if runs else 0.0
        kept = best.get(contender.peer)
        if kept is None or rate > tried[kept.name][0]["32x1"]["images_per_s"]:
            best[contender.peer] = contender
    return list(best.values())


def main(
    setup: Annotated[bool, typer.Option("--setup", help="Make the peers' environments and stop.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    seconds: Annotated[
        float, typer.Option(help="Seconds of one load; every caller calls twice at least.")
    ] = 15.0,
    only: Annotated[str, typer.Option(help="Peers to measure, by comma; all by default.")] = "",
    scenario: Annotated[str, typer.Option(help="Loads, by comma: 1x1, 32x1, 4x32; all by default.")] = "",
    tune: Annotated[bool, typer.Option(help="Choose between a peer's settings; else its first.")] = True,
) -> None:
    """Measure, print the table, and write JSON and plot."""
    if setup:
        for name in environments.ENVIRONMENTS:
            environments.make(name)
        return
    missing = [name for name in environments.ENVIRONMENTS if not environments.ready(name)]
    if missing and only != "monofacet":
        raise typer.BadParameter(f"{', '.join(missing)}: run `python -m benchmarks.peers --setup` first")
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    files = jpegs(256)
    write_pictures(files)
    bundle = vit_b_32(OUT / "vit-b-32")
    converted = write_transformers(bundle, OUT / "vit-b-32-transformers")
    apart = difference(bundle, converted)
    if apart > TOLERANCE:
        raise RuntimeError(f"the two layouts are not the same model: {apart:.1e}")
    expected = reference(bundle, files[:CHECKED])
    loads = tuple(s for s in SCENARIOS if not scenario or s.name in scenario.split(","))
    found = [
        contender
        for contender in contenders(bundle, converted, Settings().threads)
        if not only or contender.peer in only.split(",")
    ]
    report: dict[str, Any] = {
        "bundle": bundle.id,
        "machine": {"processor": processor(), "cores": Settings().threads, "load": os.getloadavg()[0]},
        "ceiling": ceiling(bundle.clip_config),
        "layouts_differ_by": apart,
        "seconds": seconds,
        "versions": {n: environments.versions(n) for n in environments.ENVIRONMENTS if n not in missing},
        "environment": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]},
        "contenders": {contender.name: describe(contender) for contender in found},
        "failed": {},
    }
    visits: Visits = {}
    tried: Visits = {}

    def attempt(contender: Contender, into: Visits, which: tuple[Any, ...], length: float) -> None:
        log = OUT / f"peers-{contender.peer}.log"
        began = time.perf_counter()
        try:
            result = visit(contender, bundle, expected, which, length, log)
        except RuntimeError as error:
            report["failed"][contender.name] = str(error)
            console.print(f"[red]{contender.name} failed[/red]: {str(error)[-600:]}")
            return
        into.setdefault(contender.name, []).append(result)
        rates = ", ".join(f"{s.name} {result[s.name]['images_per_s']:.2f}/s" for s in which)
        console.print(f"{contender.name}: {rates} ({time.perf_counter() - began:.0f} s)")

    peers = [contender.peer for contender in found]
    if tune:
        for contender in found:
            if peers.count(contender.peer) > 1:
                attempt(contender, tried, tuple(s for s in SCENARIOS if s.name == "32x1"), min(seconds, 8.0))
        found = choose([c for c in found if peers.count(c.peer) == 1 or c.name in tried], tried)
    else:
        found = choose(found, {})
    for number in range(rounds):
        # Another order each time, so that nobody always runs on the cooler machine.
        for contender in found[number % len(found) :] + found[: number % len(found)]:
            attempt(contender, visits, loads, seconds)
        report["tried"] = {name: runs[0]["32x1"]["images_per_s"] for name, runs in tried.items()}
        report["rounds"] = number + 1
        report["results"] = summary(visits, loads)
        (OUT / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(report))
    plot(report, OUT / "peers.png")


if __name__ == "__main__":
    typer.run(main)
