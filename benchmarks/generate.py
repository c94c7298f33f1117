"""Generation, served against in-process: one table, and out/bench/generate.json.

`python -m benchmarks.generate [--bundle DIR] [--rounds 5]`

What steering adds, what batching gives, what serving costs, and whether cancelled calls leave memory behind.
Both sides run the same pipeline with the same threads. What is compared is measured in turns, and medians are
reported, because a machine's speed drifts.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

# Before torch is imported: two busy processes that spin while they wait would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from monofacet import Client, SteeringEdit
from rich.console import Console
from rich.table import Table

from deployments.operations.settings import EMBEDDED_BUNDLE, Settings
from services.bundle.load import Bundle
from services.imaging.edits import Edit, FromReference, ImageRequest, Steering
from services.imaging.generator import Imaging
from services.modality.tables import Label
from tests.support.service import Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"

TARGETS = {
    "steering / none": 1.03,
    "8 at once / 8 in turn, served": 0.6,
    "served / in-process": 1.05,
    "memory after 20 cancels, MB": 10.0,
}
PROMPT = "woman firefighter"
MEMORY = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def seconds(call: Callable[[], Any]) -> float:
    """Return how long `call` takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each call once a round, after one round that does not count."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def memory_mb(service: Service) -> float:
    """Return the memory of the service's processes, megabytes; what they share is counted once."""
    total = 0
    for pid in service.descendants():
        try:
            match = MEMORY.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
        except OSError:
            continue
        total += int(match[1]) if match else 0
    return total / 1024


def steps_done(service: Service) -> float:
    """Return the denoising steps that the service has told so far."""
    text = urllib.request.urlopen(service.metrics_url).read().decode()
    match = re.search(r"^monofacet_generation_steps_total (\S+)", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def cancels(service: Service, client: Client, count: int) -> float:
    """Cancel so many generations after their first step, and return the growth of memory in MB."""

    def one(seed: int) -> None:
        with closing(client.generate_events(PROMPT, seeds=range(seed, seed + 8), steps=50)) as events:
            next(iter(events))

    for seed in range(5):
        one(seed)
    client.generate(PROMPT, seeds=1)
    before = memory_mb(service)
    for seed in range(count):
        one(seed)
    client.generate(PROMPT, seeds=1)
    return memory_mb(service) - before


def main(
    bundle: Annotated[Path, typer.Option(help="With a pipeline.")] = EMBEDDED_BUNDLE,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure, print and write."""
    console = Console()
    opened = Bundle.load(bundle)
    if opened.manifest.diffusion is None:
        raise typer.BadParameter("the bundle has no text-to-image pipeline")
    OUT.mkdir(parents=True, exist_ok=True)
    reference = (opened.path / opened.manifest.samples[0].path).read_bytes()
    steering = Steering((Edit(Label.IMAGE, FromReference(image=reference), 0.6),))
    edit = SteeringEdit("image", reference=reference, strength=0.6)
    imaging = Imaging.load(opened, threads=Settings().threads)
    eight = [ImageRequest(f"{PROMPT} {i}", seed=i, steering=steering) for i in range(8)]

    local = in_turns(
        {
            "none": lambda: imaging.generate([ImageRequest(PROMPT, seed=1)]),
            "steering": lambda: imaging.generate([ImageRequest(PROMPT, seed=1, steering=steering)]),
            "8 in turn": lambda: imaging.generate(eight, batch=1),
            "8 at once": lambda: imaging.generate(eight, batch=8),
        },
        rounds,
    )
    service = start_service(opened.path, OUT / "generate.log")
    try:
        with Client(service.target) as client, ThreadPoolExecutor(8) as callers:

            def served(i: int) -> Any:
                return client.generate(f"{PROMPT} {i}", seeds=i, edits=[edit])

            (first,) = client.generate(PROMPT, seeds=1).images
            (same,) = imaging.generate([ImageRequest(PROMPT, seed=1)])
            remote = in_turns(
                {
                    "in-process": lambda: imaging.generate([eight[1]]),
                    "served": lambda: served(1),
                    "8 in turn": lambda: [served(i) for i in range(8)],
                    "8 at once": lambda: list(callers.map(served, range(8))),
                },
                rounds,
            )
            growth = cancels(service, client, 20)
            steps = steps_done(service)
            time.sleep(2)
            quiet = steps_done(service) == steps
            memory = memory_mb(service)
    finally:
        service.stop()

    def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    metrics = {
        "steering / none": ratio(local, "steering", "none"),
        "8 at once / 8 in turn, in-process": ratio(local, "8 at once", "8 in turn"),
        "8 at once / 8 in turn, served": ratio(remote, "8 at once", "8 in turn"),
        "served / in-process": ratio(remote, "served", "in-process"),
        "memory after 20 cancels, MB": growth,
        "one image in-process, s": statistics.median(local["none"]),
        "memory of all processes, MB": memory,
    }
    facts = {
        "bundle": opened.id,
        "batching": imaging.batching,
        "threads": Settings().threads,
        "served bytes are in-process bytes": first.image.tobytes() == same.image.tobytes(),
        "no step after the last cancel": quiet,
    }
    table = Table("figure", "measured", "target")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.3f}", f"<= {TARGETS[name]}" if name in TARGETS else "")
    for name, fact in facts.items():
        table.add_row(name, str(fact), "")
    console.print(table)
    document = {"figures": metrics, "facts": facts, "targets": TARGETS, "local": local, "remote": remote}
    (OUT / "generate.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
