"""Mixed load for a long time, and the memory of every process: `python -m benchmarks.soak [--minutes 20]`.

Singles, batches, streams, classification, listings and broken requests, all at once. Memory must not grow by more
than 5% after warm-up, in any process, and no call may fail that should not. Prints one table, writes
out/bench/soak.json; exit code 1 when either happened.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import monofacet
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.samples import jpegs
from deployments.settings import EMBEDDED_BUNDLE
from tests.support.memory import MOST_GROWTH, growth
from tests.support.service import Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
MIB = 1024 * 1024


def memory(service: Service) -> dict[str, float]:
    """Return the resident memory (MiB) of every process of the service, by what it is."""
    found: dict[str, float] = {}
    for pid in {service.process.pid, *service.descendants()}:
        try:
            process = psutil.Process(pid)
            words = process.cmdline()
            name = words[0] if words and ":" in words[0] else process.name()
            found[f"{name.split('/')[-1][:40]} {pid}"] = process.memory_info().rss / MIB
        except psutil.Error:
            continue
    return found


def work(client: monofacet.AsyncClient, files: list[bytes]) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return the calls of the mix, by name."""
    rng = random.Random(0)

    async def stream() -> None:
        items = [f"text {rng.random()}" for _ in range(50)] + rng.sample(files, 10)
        async for _ in client.stream_encode(items, dictionary=""):
            pass

    async def broken() -> None:
        for bad in (b"not an image", files[0][:200]):
            try:
                await client.encode([bad])
            except monofacet.InvalidInputError:
                continue
            raise AssertionError("a broken image was encoded")

    async def listing() -> None:
        page = await client.features_page(page_size=200)
        await client.feature(page.cards[rng.randrange(len(page.cards))].feature)

    return {
        "single": lambda: client.encode([rng.choice(files)], dictionary=""),
        "batch": lambda: client.encode(rng.sample(files, 16) + [f"word {rng.random()}"] * 16),
        "stream": stream,
        "classify": lambda: client.classify_modality([rng.choice(files), "a red heart"]),
        "listing": listing,
        "broken": broken,
    }


async def soak(service: Service, seconds: float, every: float) -> tuple[dict[str, list[float]], Counter[str]]:
    """Load the service; return samples of memory by process, and what happened."""
    counts: Counter[str] = Counter()
    samples: dict[str, list[float]] = defaultdict(list)
    ends = time.perf_counter() + seconds
    async with monofacet.AsyncClient(service.target) as client:

        async def repeat(name: str, call: Callable[[], Awaitable[Any]]) -> None:
            while time.perf_counter() < ends:
                try:
                    await call()
                    counts[name] += 1
                except (monofacet.MonofacetError, AssertionError) as error:
                    counts[f"FAILED {name}: {error}"] += 1
                    await asyncio.sleep(1)

        busy = [asyncio.create_task(repeat(*pair)) for pair in work(client, jpegs(64)).items()]
        while time.perf_counter() < ends:
            await asyncio.sleep(every)
            for name, value in (await asyncio.to_thread(memory, service)).items():
                samples[name].append(value)
        await asyncio.gather(*busy)
    return samples, counts


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 20.0,
    bundle: Annotated[Path, typer.Option(help="What is served.")] = EMBEDDED_BUNDLE,
) -> None:
    """Load a server of its own."""
    OUT.mkdir(parents=True, exist_ok=True)
    service = start_service(bundle, OUT / "soak.log")
    try:
        samples, counts = asyncio.run(soak(service, minutes * 60, max(2.0, minutes * 60 / 120)))
    finally:
        service.stop()
    longest = max(map(len, samples.values()))
    # A process that came or went meanwhile is one of Ray's helpers, seen as such in the count below.
    grown = {name: growth(values) for name, values in samples.items() if len(values) >= longest - 1}
    failed = {key: n for key, n in counts.items() if key.startswith("FAILED")}
    report = {
        "minutes": minutes,
        "calls": dict(counts),
        "growth": grown,
        "megabytes": {name: {"first": values[0], "last": values[-1]} for name, values in samples.items()},
        "short_lived": sorted(set(samples) - set(grown)),
    }
    (OUT / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    table = Table("process", "MiB first", "MiB last", "growth after warm-up", "met")
    for name, share in sorted(grown.items()):
        met = "yes" if share <= MOST_GROWTH else "NO"
        table.add_row(name, f"{samples[name][0]:.0f}", f"{samples[name][-1]:.0f}", f"{share:+.1%}", met)
    console = Console()
    console.print(table)
    console.print(dict(counts))
    raise typer.Exit(1 if failed or max(grown.values()) > MOST_GROWTH else 0)


if __name__ == "__main__":
    typer.run(main)
