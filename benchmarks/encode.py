"""Served against in-process, and OpenVINO against torch: one table, and out/bench/encode.json.

`python -m benchmarks.encode [--seconds 8] [--rounds 3] [--images 1000] [--only served|backends]`

Both sides run the same backend, weights, threads and JPEG files (224 px, decoded each time). Rounds of the
two are interleaved and medians reported, because a machine's speed drifts. In-process is what a program
would write with `services`: decode a batch, run it, one after another.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

# Before torch is imported: two busy processes that spin while they wait would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.pictures import write_pictures
from benchmarks.samples import jpegs, vit_b_32
from deployments.operations.settings import EMBEDDED_BUNDLE, Settings
from services.bundle.load import Bundle
from services.bundle.towers import load_towers
from services.encoding.images import ImagePreprocess, load_pixels
from services.encoding.towers import Towers
from tests.support.service import start_service

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "bench"

# (bundle, load) -> the share of in-process throughput that the service must keep.
TARGETS = {
    ("embedded", "32x1"): 0.55,
    ("embedded", "4x64"): 0.85,
    ("vit-b-32", "32x1"): 0.80,
    ("vit-b-32", "4x32"): 0.90,
}
LATENCY_TARGET_MS = 15.0
COSINE_TARGET = 0.9995


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in milliseconds."""
    values = np.percentile(np.array(latencies) * 1e3, [50, 95, 99])
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, values), strict=True))


def in_process(
    call: Callable[[list[bytes]], Any], files: list[bytes], items: int, seconds: float
) -> dict[str, Any]:
    """Call with `items` files in turn for `seconds`; return rate (items/s) and latencies (s)."""
    call(files[:items])
    latencies: list[float] = []
    turn = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(latencies) < 2:
        chosen = [files[(turn + i) % len(files)] for i in range(items)]
        turn += items
        start = time.perf_counter()
        call(chosen)
        latencies.append(time.perf_counter() - start)
    return {"latencies": latencies, "rate": len(latencies) * items / (time.perf_counter() - began)}


def served(target: str, callers: int, items: int, seconds: float) -> dict[str, Any]:
    """Run the load generator in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load", target, str(callers), str(items), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(name: str, bundle: Bundle, files: list[bytes], seconds: float, rounds: int) -> dict[str, Any]:
    """Measure one bundle, served and in-process, in interleaved rounds."""
    settings = Settings()
    towers = load_towers(bundle, threads=settings.threads)
    towers.warm_up(settings.max_batch_items)
    preprocess = ImagePreprocess(bundle.clip_config)

    def call(chosen: list[bytes]) -> Any:
        return towers.encode_images(load_pixels(chosen, preprocess))

    large = 32 if name == "vit-b-32" else 64
    loads = {"1x1": (1, 1), "32x1": (32, 1), f"4x{large}": (4, large)}
    local: dict[int, list[dict[str, Any]]] = {1: [], 32: []}
    remote: dict[str, list[dict[str, Any]]] = {load: [] for load in loads}
    service = start_service(bundle.path, OUT / f"{name}.log")
    try:
        for _ in range(rounds):
            for items, runs in local.items():
                runs.append(in_process(call, files, items, seconds))
            for load, (callers, items) in loads.items():
                remote[load].append(served(service.target, callers, items, seconds))
    finally:
        service.stop()
        towers.close()

    def median(runs: list[dict[str, Any]]) -> dict[str, float]:
        together = [latency for run in runs for latency in run["latencies"]]
        return {"images_per_s": float(np.median([run["rate"] for run in runs])), **percentiles(together)}

    baseline = median(local[32])
    result: dict[str, Any] = {
        "bundle": bundle.id,
        "backend": towers.backend,
        "precision": towers.precision,
        "in_process": {"batch 1": median(local[1]), "batch 32": baseline},
        "served": {},
    }
    for load, runs in remote.items():
        # The ratio within each round, then the median: what slows the machine slows both sides.
        ratios = [run["rate"] / base["rate"] for run, base in zip(runs, local[32], strict=True)]
        result["served"][load] = {
            **median(runs),
            "of_batch_32": float(np.median(ratios)),
            "target": TARGETS.get((name, load)),
        }
    extra = [
        float(np.median(run["latencies"]) - np.median(base["latencies"])) * 1e3
        for run, base in zip(remote["1x1"], local[1], strict=True)
    ]
    result["p50_over_in_process_ms"] = float(np.median(extra))
    return result


def neighbours(towers: Towers, pixels: np.ndarray[Any, Any]) -> float:
    """Return the largest absolute difference of any embedding by batch size and neighbours."""
    alone = np.concatenate([towers.encode_images(pixels[i : i + 1]).unit for i in range(len(pixels))])
    worst = 0.0
    for size in (2, 7, 22, 32, 64):
        order = np.random.default_rng(size).permutation(len(pixels))
        together = np.concatenate(
            [towers.encode_images(pixels[order[i : i + size]]).unit for i in range(0, len(order), size)]
        )
        worst = max(worst, float(np.abs(together - alone[order]).max()))
    return worst


def backends(bundle: Bundle, files: list[bytes], seconds: float, rounds: int) -> dict[str, Any]:
    """Compare the backends of one bundle: cosine, speed, and independence of the batch."""
    settings = Settings()
    pixels = load_pixels(files, ImagePreprocess(bundle.clip_config))
    made = {
        "torch f32": load_towers(bundle, "torch", threads=settings.threads, precision="f32"),
        "openvino": load_towers(bundle, "openvino", threads=settings.threads),
    }
    units = {name: towers.encode_images(pixels).unit for name, towers in made.items()}
    cosine = np.einsum("nd,nd->n", *(u.astype(np.float64) for u in units.values()))
    rates: dict[str, list[float]] = {name: [] for name in made}
    batch = pixels[:32]
    for _ in range(rounds):
        for name, towers in made.items():
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                towers.encode_images(batch)
                count += len(batch)
            rates[name].append(count / (time.perf_counter() - began))
    speed = [fast / slow for fast, slow in zip(rates["openvino"], rates["torch f32"], strict=True)]
    result = {
        "bundle": bundle.id,
        "images": len(files),
        "openvino_precision": made["openvino"].precision,
        "cosine_min": float(cosine.min()),
        "cosine_mean": float(cosine.mean()),
        "cosine_target": COSINE_TARGET,
        "images_per_s": {name: float(np.median(values)) for name, values in rates.items()},
        "speed_up": float(np.median(speed)),
        "max_abs_difference_by_batch": {
            name: neighbours(towers, pixels[:64]) for name, towers in made.items()
        },
    }
    for towers in made.values():
        towers.close()
    return result


def table(report: dict[str, Any]) -> Table:
    """Return every figure beside its target."""
    shown = Table("what", "images/s", "p50 ms", "p95 ms", "p99 ms", "ratio", "target", "met")

    def met(value: float, target: float | None, at_least: bool = True) -> list[str]:
        if target is None:
            return [f"{value:.2f}", "", ""]
        good = value >= target if at_least else value <= target
        sign = ">=" if at_least else "<="
        return [f"{value:.4g}", f"{sign} {target:g}", "yes" if good else "NO"]

    for name, one in report.get("served", {}).items():
        for batch, metrics in one["in_process"].items():
            shown.add_row(f"{name} in-process {batch}", *(f"{metrics[k]:.1f}" for k in _FIGURES), "", "", "")
        for load, metrics in one["served"].items():
            row = [f"{metrics[k]:.1f}" for k in _FIGURES]
            shown.add_row(f"{name} served {load}", *row, *met(metrics["of_batch_32"], metrics["target"]))
        extra = one["p50_over_in_process_ms"]
        shown.add_row(
            f"{name} p50 over in-process, ms", "", "", "", "", *met(extra, LATENCY_TARGET_MS, at_least=False)
        )
    for name, one in report.get("backends", {}).items():
        what = f"{name} openvino {one['openvino_precision']} over torch f32"
        shown.add_row(f"{what}: cosine, lowest of {one['images']}", "", "", "", "",
                      *met(one["cosine_min"], COSINE_TARGET))  # fmt: skip
        shown.add_row(f"{what}: speed", f"{one['images_per_s']['openvino']:.1f}", "", "", "",
                      f"{one['speed_up']:.2f}", "", "")  # fmt: skip
        for backend, difference in one["max_abs_difference_by_batch"].items():
            shown.add_row(
                f"{name} {backend}: max abs difference by batch", "", "", "", "", f"{difference:.1e}", "", ""
            )
    return shown


_FIGURES = ("images_per_s", "p50_ms", "p95_ms", "p99_ms")


def main(
    seconds: Annotated[float, typer.Option(help="Seconds of one measurement.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 3,
    images: Annotated[int, typer.Option(help="Images of the comparison of backends.")] = 1000,
    only: Annotated[str, typer.Option(help="served or backends; both by default.")] = "",
    bundles: Annotated[str, typer.Option(help="embedded, vit-b-32, or both.")] = "embedded,vit-b-32",
    embedded: Annotated[Path, typer.Option(help="The embedded bundle.")] = EMBEDDED_BUNDLE,
) -> None:
    """Measure, print the table, and write the JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    files = jpegs(max(images, 256))
    write_pictures(files[:256])
    report: dict[str, Any] = {
        "machine": {"cores": Settings().threads, "processor": platform.processor()},
        "seconds": seconds,
        "rounds": rounds,
        "served": {},
        "backends": {},
    }  # fmt: skip
    makers: dict[str, Callable[[], Bundle]] = {
        "embedded": lambda: Bundle.load(embedded, verify=False),
        "vit-b-32": lambda: vit_b_32(OUT / "vit-b-32"),
    }
    for name in bundles.split(","):
        bundle = makers[name]()
        if only != "backends":
            report["served"][name] = compare(name, bundle, files[:256], seconds, rounds)
        if only != "served":
            report["backends"][name] = backends(bundle, files[:images], min(seconds, 4.0), rounds)
        (OUT / "encode.json").write_text(json.dumps(report, indent=1) + "\n")
    Console(width=140).print(table(report))


if __name__ == "__main__":
    typer.run(main)
