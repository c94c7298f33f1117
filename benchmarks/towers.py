"""The image towers as a share of what the processor could do: a table, and out/bench/towers.json.

`python -m benchmarks.towers [--models ViT-B-32,ViT-L-14] [--batches 1,8,32] [--seconds 4] [--rounds 3]`

On a GPU where there is one, else on the CPU; the precision is the one that the service would take. The ceiling is the
speed of large matrix products in that precision on the same device, over the operations of one image. In-process is
`encode_images` on decoded pictures; through the batcher is the encoder's own queue with the pictures of many callers of
one image, decoded before, so that it shows what queueing and splitting into chunks cost. Rounds are interleaved.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.ceilings import image_flops, matmul_flops
from benchmarks.samples import jpegs, random_clip
from deployments.encoder.encoder import Encoder
from deployments.encoder.model import TowerModel
from deployments.encoder.tasks import EncodeTask
from deployments.operations.settings import Settings
from services.check import Check
from services.encoding.formats.picture import Picture
from services.encoding.images import ImagePreprocess, load_pixels
from services.encoding.torch_backend import DTYPES

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
# Callers of one image that keep the batcher full: two batches of 32.
CALLERS = 64


class Decoded:
    """A model whose pictures are decoded already: an item is the number of one."""

    def __init__(self, model: TowerModel, pixels: np.ndarray[Any, Any]) -> None:
        self._model = model
        self._pixels = pixels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def open(self, data: bytes) -> Picture:
        """Return the number of a picture as one."""
        return Picture("PNG", data, 1, 1, 0.0)

    def decode(self, picture: Picture, check: Check) -> np.ndarray[Any, Any]:
        """Return the pixels of a picture."""
        found: np.ndarray[Any, Any] = self._pixels[int(picture.data) % len(self._pixels)]
        return found


def rate_in_process(model: TowerModel, pixels: np.ndarray[Any, Any], batch: int, seconds: float) -> float:
    """Return images per second of forwards of `batch`."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        model.encode_images(pixels[:batch])
        count += batch
    return count / (time.perf_counter() - began)


async def rate_batched(encoder: Encoder, seconds: float) -> float:
    """Return images per second of `CALLERS` closed loops of one image."""
    finished = 0
    began = time.perf_counter()

    async def caller(number: int) -> None:
        nonlocal finished
        # Bytes make it an image; what they say is its number.
        task = EncodeTask((str(number).encode(),))
        while time.perf_counter() - began < seconds:
            (answer,) = (await encoder.encode([task], [None])).answers
            if isinstance(answer, Exception):
                raise answer
            finished += 1

    await asyncio.gather(*map(caller, range(CALLERS)))
    return finished / (time.perf_counter() - began)


async def measure(name: str, batches: list[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Measure one model."""
    bundle = random_clip(OUT / name.lower(), name)
    settings = Settings()
    pixels = load_pixels(jpegs(max([*batches, 32])), ImagePreprocess(bundle.clip_config))
    model = TowerModel(bundle, settings)
    model.warm_up(settings.max_batch_items)
    info = model.info()
    shown: Any = Decoded(model, pixels)
    encoder = Encoder(settings, shown, {})
    precision = {"fp32": "f32", "fp16": "f16"}.get(info.precision, info.precision)
    ceiling = matmul_flops(info.device, DTYPES[precision]) / image_flops(bundle.clip_config)
    rates: dict[str, list[float]] = {f"in-process, batch of {batch}": [] for batch in batches}
    rates["through the batcher"] = []
    for _ in range(rounds):
        for batch in batches:
            rates[f"in-process, batch of {batch}"].append(rate_in_process(model, pixels, batch, seconds))
        rates["through the batcher"].append(await rate_batched(encoder, seconds))
    await encoder.close()
    return {
        "backend": info.backend,
        "device": torch.cuda.get_device_name() if info.device.startswith("cuda") else info.device,
        "precision": info.precision,
        "threads": info.threads,
        "gflop_per_image": image_flops(bundle.clip_config) / 1e9,
        "ceiling_images_per_s": ceiling,
        "images_per_s": {way: float(np.median(values)) for way, values in rates.items()},
        "of_ceiling": {way: float(np.median(values)) / ceiling for way, values in rates.items()},
    }


def main(
    models: Annotated[str, typer.Option(help="Names of open_clip's, by comma.")] = "ViT-B-32,ViT-L-14",
    batches: Annotated[str, typer.Option(help="Images of one forward, by comma.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(help="Seconds of one measurement.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure, print a table and write the JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"load": os.getloadavg()[0], "models": {}}
    table = Table("model", "runs on", "way", "images/s", "share of the ceiling")
    for name in models.split(","):
        one = asyncio.run(measure(name, [int(batch) for batch in batches.split(",")], seconds, rounds))
        report["models"][name] = one
        where = f"{one['device']}, {one['backend']} {one['precision']}"
        for way, rate in one["images_per_s"].items():
            table.add_row(name, where, way, f"{rate:.1f}", f"{one['of_ceiling'][way]:.0%}")
        table.add_row(name, where, "ceiling", f"{one['ceiling_images_per_s']:.1f}", "", end_section=True)
        (OUT / "towers.json").write_text(json.dumps(report, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
