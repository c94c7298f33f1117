"""Seconds a picture takes in one process: alone, 4 at once and 16 at once, by each bundle, at its default settings.

Beside the time on the clock stands the processors' own, which other programs on the machine change little.

`python -m benchmarks.picture_time bundles/emoji [another bundle ...] [--rounds 3]`

Bundles and sizes are measured in turns, and medians reported, because a machine's speed drifts. Writes one table and
out/bench/picture_time.json.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.console import Console
from rich.table import Table

from services.bundle.load import Bundle
from services.encoding.machine import usable_cores
from services.imaging.edits import ImageRequest
from services.imaging.generator import Imaging

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
AT_ONCE = (1, 4, 16)
PROMPT = "woman firefighter"


def main(
    bundles: Annotated[list[Path], typer.Argument(help="with pipelines")],
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option()] = usable_cores(),
) -> None:
    """Measure, print and write."""
    loaded = [Bundle.load(path) for path in bundles]
    imagings = [Imaging.load(bundle, device="cpu", threads=threads) for bundle in loaded]
    seconds: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for which, imaging in enumerate(imagings):
            for count in AT_ONCE:
                began, busy = time.perf_counter(), time.process_time()
                imaging.generate([ImageRequest(PROMPT, seed=i) for i in range(count)], batch=count)
                # The first turn warms up.
                if turn:
                    taken = (time.perf_counter() - began) / count, (time.process_time() - busy) / count
                    seconds.setdefault((which, count), []).append(taken)
    table = Table(
        "bundle", "pixels", "steps", *(f"{count} at once, s (CPU s)" for count in AT_ONCE), title="A picture"
    )
    found: list[dict[str, Any]] = []
    for which, (bundle, imaging) in enumerate(zip(loaded, imagings, strict=True)):
        wall, cpu = (
            {str(count): statistics.median(s[i] for s in seconds[which, count]) for count in AT_ONCE}
            for i in (0, 1)
        )
        entry = imaging.entry
        found.append(
            {
                "bundle": bundle.id,
                "pixels": entry.height,
                "steps": entry.num_inference_steps,
                "batching": imaging.batching,
                "seconds": wall,
                "cpu_seconds": cpu,
            }
        )
        table.add_row(
            bundle.id,
            str(entry.height),
            str(entry.num_inference_steps),
            *(f"{wall[n]:.2f} ({cpu[n]:.2f})" for n in wall),
        )
    Console().print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    document = {"threads": threads, "load": os.getloadavg()[0], "bundles": found}
    (OUT / "picture_time.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
