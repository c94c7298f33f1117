"""Mixed load for a long time, and the memory of every process: `python -m benchmarks.soak [--minutes 20]`.

Singles, batches, streams, modality, gender, verdicts, listings, broken requests and generated images, all at once, once
everything is warm. Memory must not grow by more than 5% after warm-up, in any process, and no call may fail that should
not. Prints one table, writes out/bench/soak.json; exit code 1 when either happened.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import monofacet
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.samples import jpegs
from benchmarks.start import name_of, serving_s
from deployments.gateway.services import IMAGING
from deployments.operations.settings import EMBEDDED_BUNDLE
from tests.support.memory import MOST_GROWTH, growth
from tests.support.service import Service, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
MIB = 1024 * 1024


def memory(service: Service) -> dict[int, float]:
    """Return the resident memory (MiB) of every process of the service, by its id."""
    found: dict[int, float] = {}
    for pid in {service.process.pid, *service.descendants()}:
        with suppress(psutil.Error):
            found[pid] = psutil.Process(pid).memory_info().rss / MIB
    return found


def names(service: Service) -> dict[int, str]:
    """Return what each process is. Ray's change their titles with what they do, which is left out."""
    found: dict[int, str] = {}
    for pid in {service.process.pid, *service.descendants()}:
        with suppress(OSError):
            found[pid] = f"{name_of(pid).split('.')[0]} {pid}"
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
        "generate": lambda: client.generate("a red heart", seeds=[rng.randrange(1000)]),
        "gender": lambda: client.classify_gender([rng.choice(files), "a nurse"]),
        "filter": lambda: client.filter_adversarial([rng.choice(files)]),
        "single": lambda: client.encode([rng.choice(files)], dictionary=""),
        "batch": lambda: client.encode(rng.sample(files, 16) + [f"word {rng.random()}"] * 16),
        "stream": stream,
        "classify": lambda: client.classify_modality([rng.choice(files), "a red heart"]),
        "listing": listing,
        "broken": broken,
    }


async def soak(service: Service, seconds: float, every: float) -> tuple[dict[int, list[float]], Counter[str]]:
    """Load the service; return samples of memory by process, and what happened."""
    counts: Counter[str] = Counter()
    samples: dict[int, list[float]] = defaultdict(list)
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
            for pid, value in (await asyncio.to_thread(memory, service)).items():
                samples[pid].append(value)
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
        for name in ("", IMAGING):
            serving_s(service.target, name, time.time())
        samples, counts = asyncio.run(soak(service, minutes * 60, max(2.0, minutes * 60 / 120)))
        named = names(service)
    finally:
        service.stop()
    longest = max(map(len, samples.values()))
    # One that came or went meanwhile is a helper of Ray's: it is listed, and its growth says nothing.
    whole = {
        named[pid]: values for pid, values in samples.items() if len(values) >= longest - 1 and pid in named
    }
    grown = {name: growth(values) for name, values in whole.items()}
    failed = {key: n for key, n in counts.items() if key.startswith("FAILED")}
    report = {
        "minutes": minutes,
        "calls": dict(counts),
        "growth": grown,
        "megabytes": {name: {"first": values[0], "last": values[-1]} for name, values in whole.items()},
        "short_lived": sorted(named.get(pid, str(pid)) for pid in samples if named.get(pid) not in whole),
    }
    (OUT / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    table = Table("process", "MiB first", "MiB last", "growth after warm-up", "met")
    for name, share in sorted(grown.items()):
        met = "yes" if share <= MOST_GROWTH else "NO"
        table.add_row(name, f"{whole[name][0]:.0f}", f"{whole[name][-1]:.0f}", f"{share:+.1%}", met)
    console = Console()
    console.print(table)
    console.print(dict(counts))
    raise typer.Exit(1 if failed or max(grown.values()) > MOST_GROWTH else 0)


if __name__ == "__main__":
    typer.run(main)
