"""From measurements to medians, ratios, a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.peers.measure import Scenario

OURS = "monofacet"
# The goals: throughput over the best peer's, and the lone caller's median over the best peer's.
LEAST_RATIO = 1.8
MOST_P50_RATIO = 1.0


def _median(values: list[float]) -> float:
    return float(np.median(values))


def _p50_ms(run: dict[str, Any]) -> float:
    return float(np.median(run["latencies"])) * 1e3


def summary(
    visits: dict[str, list[dict[str, Any]]], scenarios: tuple[Scenario, ...]
) -> dict[str, dict[str, Any]]:
    """Return by load: each contender's medians, and this service over the best peer of each round."""
    found: dict[str, dict[str, Any]] = {}
    ours = next((name for name in visits if name.startswith(OURS)), None)
    for scenario in scenarios:
        runs = {name: [visit[scenario.name] for visit in rounds] for name, rounds in visits.items()}
        entry: dict[str, Any] = {name: metrics(several) for name, several in runs.items()}
        peers = [name for name in runs if name != ours]
        if ours is not None and peers:
            count = min(len(several) for several in runs.values())
            rate = [
                runs[ours][i]["images_per_s"] / max(runs[name][i]["images_per_s"] for name in peers)
                for i in range(count)
            ]
            p50 = [_p50_ms(runs[ours][i]) / min(_p50_ms(runs[n][i]) for n in peers) for i in range(count)]
            cpu = [
                min(runs[name][i]["cpu_ms_per_image"] for name in peers) / runs[ours][i]["cpu_ms_per_image"]
                for i in range(count)
            ]
            entry["over the best peer"] = {
                "throughput": _median(rate),
                "p50": _median(p50),
                "images_per_cpu_second": _median(cpu),
            }
        found[scenario.name] = entry
    return found


def metrics(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of some runs of one load."""
    together = np.array([latency for run in runs for latency in run["latencies"]]) * 1e3
    return {
        "images_per_s": _median([run["images_per_s"] for run in runs]),
        "images_per_s_of_rounds": [run["images_per_s"] for run in runs],
        **{f"p{q}_ms": float(np.percentile(together, q)) for q in (50, 95, 99)},
        "cpu_ms_per_image": _median([run["cpu_ms_per_image"] for run in runs]),
    }


def table(report: dict[str, Any]) -> Table:
    """Return every figure, and the ratios beside their goals."""
    ceiling = report["ceiling"]
    title = (
        f"{report['machine']['processor']}, {report['machine']['cores']} cores, load {report['machine']['load']:.1f}; "
        f"float32 ceiling {ceiling['images_per_s']:.1f} images/s"
    )
    shown = Table("load", "server", "images/s", "p50 ms", "p95 ms", "CPU ms an image", "goal", title=title)
    for load, entry in report["results"].items():
        for name, value in entry.items():
            if name == "over the best peer":
                single = load == "1x1"
                ratio = value["p50"] if single else value["throughput"]
                met = ratio <= MOST_P50_RATIO if single else ratio >= LEAST_RATIO
                goal = f"p50 <= {MOST_P50_RATIO:g}" if single else f"throughput >= {LEAST_RATIO:g}"
                shown.add_row(
                    load,
                    "[bold]monofacet over the best peer[/bold]",
                    f"x {value['throughput']:.2f}",
                    f"x {value['p50']:.2f}",
                    "",
                    f"images a CPU second x {value['images_per_cpu_second']:.2f}",
                    f"{goal}: {'yes' if met else 'NO'}",
                    end_section=True,
                )
            else:
                shown.add_row(
                    load,
                    name,
                    f"{value['images_per_s']:.2f}",
                    f"{value['p50_ms']:.0f}",
                    f"{value['p95_ms']:.0f}",
                    f"{value['cpu_ms_per_image']:.0f}",
                    "",
                )
    return shown


def plot(report: dict[str, Any], path: Path) -> None:
    """Write the plot: a panel a load, a bar a server, whiskers from the slowest round to the fastest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = list(report["results"])
    figure, panels = plt.subplots(1, len(loads), figsize=(4.6 * len(loads), 3.6), squeeze=False)
    for panel, load in zip(panels[0], loads, strict=True):
        entry = {name: v for name, v in report["results"][load].items() if name != "over the best peer"}
        names = list(entry)
        single = load == "1x1"
        values = [entry[name]["p50_ms" if single else "images_per_s"] for name in names]
        colours = ["#1b6ca8" if name.startswith(OURS) else "#b8bec6" for name in names]
        panel.bar(range(len(names)), values, color=colours)
        if not single:
            spread = [entry[name]["images_per_s_of_rounds"] for name in names]
            low = [value - min(several) for value, several in zip(values, spread, strict=True)]
            high = [max(several) - value for value, several in zip(values, spread, strict=True)]
            panel.errorbar(range(len(names)), values, yerr=[low, high], fmt="none", ecolor="black", capsize=3)
            ceiling = report["ceiling"]["images_per_s"]
            panel.axhline(ceiling, color="#c0392b", linestyle="--", linewidth=1)
            panel.text(-0.4, ceiling, "float32 ceiling", color="#c0392b", fontsize=8, va="bottom")
        panel.set_xticks(range(len(names)), [name.split(" (")[0] for name in names], fontsize=9)
        panel.set_ylabel("p50, ms" if single else "images/s")
        callers, items = map(int, load.split("x"))
        panel.set_title(f"{_many(callers, 'caller')}, {_many(items, 'image')} a call", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
