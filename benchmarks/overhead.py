"""What features, modalities and verdicts add to an encode of ViT-B-32: a table, and out/bench/overhead.json.

`python -m benchmarks.overhead [--sizes 8192,65536] [--batches 32,1] [--rounds 7]`, and with `--served` also
`[--seconds 6] [--callers 32]`.

In-process: one batch of decoded pictures is encoded, and then given to each kind of work that rides on the encode: the
dictionary's activations, how their energy is spread over modality labels, and the whole verdict of the defense with its
messages. All on the same arrays, in turn, round by round; a cost is the work's time over the encode's of its round, and
the median over rounds is reported, of wall time and of CPU time. On a machine that is busy with something else, CPU
time is the one to read.

Served: the same bundle behind the service, and the rates of the calls over Encode's, as in `benchmarks.extra_outputs`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# Before torch is imported: two busy processes that spin while they wait would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import extra_outputs
from benchmarks.pictures import write_pictures
from benchmarks.samples import jpegs, vit_b_32_with_features
from deployments.encoder.encoder import strongest
from deployments.encoder.model import TowerModel, load_dictionaries
from deployments.encoder.tasks import Features
from deployments.gateway.compute.decoders import read_decoders
from deployments.gateway.compute.defense import (
    FeatureLabels,
    LabelTexts,
    Question,
    filtered_images,
    judge,
    looks,
)
from deployments.gateway.compute.modality import classify
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.defense import DefenseCalibration
from services.defense.screen import choose
from services.encoding.images import ImagePreprocess, load_pixels
from services.modality.modalities import Modality
from tests.support.service import start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
# Features of the dictionary -> what all of the work together may add to an encode.
TARGETS = {8_192: 0.05, 65_536: 0.10}
TOP = 20
FALSE_POSITIVES = 0.01


class Computation:
    """The kinds of work on one bundle, each a function of a batch.

    Parameters
    ----------
    bundle : Bundle
        With a modality table and a calibrated defense of its default dictionary.
    """

    def __init__(self, bundle: Bundle) -> None:
        settings = Settings()
        self.model = TowerModel(bundle, settings)
        name = bundle.resolve("")
        self._dictionary = load_dictionaries(bundle)[name]
        self._table = bundle.modality(name)
        entry = bundle.manifest.defense
        assert entry is not None
        self._calibration = DefenseCalibration.read(bundle.path / entry.config, bundle.path / entry.weights)
        self._names = FeatureLabels(self._table)
        self._choice = choose(self._calibration, None, None, False)
        self._decoder = read_decoders(bundle, name)[Modality.IMAGE]
        self._labels = LabelTexts(
            self._calibration.labels, self._calibration.label_units, self.model.info().logit_scale
        )

    def features(self, unit: np.ndarray[Any, Any]) -> list[Features]:
        """Return the active features of unit embeddings."""
        import torch

        with torch.inference_mode():
            rows = self._dictionary.encode_sparse(torch.from_numpy(unit), Modality.IMAGE)
        return [strongest(row, None) for row in rows]

    def modalities(self, features: list[Features]) -> list[Any]:
        """Return how the energy of each input is spread over the labels."""
        return [classify(row, self._table, TOP) for row in features]

    def verdicts(
        self, pixels: np.ndarray[Any, Any], unit: np.ndarray[Any, Any], features: list[Features]
    ) -> list[Any]:
        """Return the verdict on each image, one look, as the contract's messages."""
        question = Question(
            looks(unit, features), None, self.model.noise(pixels), self._choice, False, self._labels
        )
        (found,) = judge([question], self._calibration, self._decoder, FALSE_POSITIVES)
        return filtered_images(found, self._names, TOP)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall and the CPU seconds of one run, all threads counted."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_process(work: Computation, pixels: np.ndarray[Any, Any], rounds: int) -> dict[str, Any]:
    """Return the cost of each kind of work on a batch of pictures, and of all together, as a share of the encode."""
    unit, _ = work.model.encode_images(pixels)
    features = work.features(unit)
    kinds: dict[str, Callable[[], Any]] = {
        "encode": lambda: work.model.encode_images(pixels),
        "dictionary": lambda: work.features(unit),
        "modality": lambda: work.modalities(features),
        "defence": lambda: work.verdicts(pixels, unit, features),
    }
    for run in kinds.values():
        run()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, run in kinds.items():
            seconds[name].append(timed(run))
    spent = {name: np.array(values) for name, values in seconds.items()}
    shares = {name: np.median(spent[name] / spent["encode"], axis=0) for name in kinds if name != "encode"}
    return {
        "encode_ms_per_image": float(np.median(spent["encode"][:, 0])) * 1e3 / len(pixels),
        "wall": {name: float(share[0]) for name, share in shares.items()},
        "cpu": {name: float(share[1]) for name, share in shares.items()},
        "all_wall": float(sum(share[0] for share in shares.values())),
        "all_cpu": float(sum(share[1] for share in shares.values())),
    }


def served(bundle: Bundle, callers: int, seconds: float, rounds: int) -> dict[str, float]:
    """Return what each call adds, as a share of Encode: the median of Encode's rate over the call's, less 1."""
    service = start_service(bundle.path, OUT / "overhead.log")
    try:
        rates = asyncio.run(extra_outputs.measure(service.target, callers, seconds, rounds))
    finally:
        service.stop()
    encode = np.array(rates[extra_outputs.ENCODE])
    return {
        name: float(np.median(encode / np.array(values))) - 1
        for name, values in rates.items()
        if name != extra_outputs.ENCODE
    }


def main(
    sizes: Annotated[str, typer.Option(help="Features of the dictionary, by comma.")] = "8192,65536",
    batches: Annotated[str, typer.Option(help="Images of one encode, by comma.")] = "32,1",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    serve: Annotated[bool, typer.Option("--served", help="Measure the service, too.")] = False,
    seconds: Annotated[float, typer.Option(help="Seconds of one call in one round, served.")] = 6.0,
    callers: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Measure, print a table and write the JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    files = jpegs(64)
    write_pictures(files)
    table = Table("features", "where", "kind of work", "wall", "CPU", "goal", "met")
    report: dict[str, Any] = {
        "load": os.getloadavg()[0],
        "cores": Settings().threads,
        "k": 32,
        "rounds": rounds,
    }
    for n in map(int, sizes.split(",")):
        bundle = vit_b_32_with_features(OUT / f"vit-b-32-{n}", n)
        goal = TARGETS.get(n)
        entry = report[str(n)] = {"bundle": bundle.id, "goal": goal, "in_process": {}, "served": {}}

        def row(
            where: str, kind: str, wall: float, cpu: float | None, target: float | None, n: int = n
        ) -> None:
            bound = "" if target is None else f"<= {target:.0%}"
            met = "" if target is None else "yes" if (wall if cpu is None else cpu) <= target else "NO"
            table.add_row(
                f"{n:,}", where, kind, f"{wall:.2%}", "" if cpu is None else f"{cpu:.2%}", bound, met
            )

        work = Computation(bundle)
        for batch in map(int, batches.split(",")):
            pixels = load_pixels(files[:batch], ImagePreprocess(bundle.clip_config))
            one = entry["in_process"][str(batch)] = in_process(work, pixels, rounds)
            where = f"in-process, batch of {batch}"
            for kind in one["wall"]:
                row(where, kind, one["wall"][kind], one["cpu"][kind], None)
            row(where, "all", one["all_wall"], one["all_cpu"], goal)
        work.model.close()
        if serve:
            entry["served"] = served(bundle, callers, seconds, rounds)
            for name, cost in entry["served"].items():
                row(
                    f"served, {callers} callers",
                    name,
                    cost,
                    None,
                    goal if name in extra_outputs.ONE_FORWARD else None,
                )
        (OUT / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
