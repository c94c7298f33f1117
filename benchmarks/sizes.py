"""What towers and dictionaries of real sizes take: a table, and out/bench/sizes.json.

`python -m benchmarks.sizes [--models ViT-B-32,ViT-L-14] [--features 0,65536] [--batch 32] [--rounds 5]`

Each pair of a model and a number of features (0 stands for 16 times the embedding) is a bundle of random weights in the
real formats, verified and loaded by the encoder's own path in a process of its own, so that its memory is its own.
Loading is from the files to the first answer. Rounds of an encode and of an encode with the active features of each
image are interleaved; medians are reported, and the ratio within a round. Neither speed nor memory depends on the
weights.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.samples import jpegs, random_clip, random_modality
from deployments.encoder.model import TowerModel, load_dictionaries
from deployments.operations.settings import Settings
from services.bundle.load import MODALITY, Bundle, write_manifest
from services.bundle.manifest import Licence
from services.dictionaries import SAE
from services.encoding.images import ImagePreprocess, load_pixels
from services.errors import BundleError
from services.modality.modalities import Modality

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
K = 32
EXPANSION = 16


def clip_with_features(folder: Path, name: str, n_features: int) -> Bundle:
    """Return a bundle of a model of open_clip's and a TopK autoencoder, of random weights; made on the first call."""
    plain = random_clip(folder / name.lower(), name)
    d = plain.clip_config.embed_dim
    n = n_features or EXPANSION * d
    path = folder / f"{name.lower()}-{n}"
    try:
        return Bundle.load(path, verify=False)
    except BundleError:
        pass
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(plain.path / "clip", path / "clip")
    torch.manual_seed(0)
    SAE(d, n, K).save(path / "dictionaries", "sae", tower_fingerprint=plain.manifest.clip.fingerprint)
    random_modality(n).write(path / MODALITY / "sae.parquet")
    write_manifest(
        path,
        name=path.name,
        description=f"{name} with {n:,} features, of random weights, for measuring.",
        licences=[Licence("Apache-2.0", "everything")],
        default_dictionary="sae",
    )
    return Bundle.load(path, verify=False)


def measure(path: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Return the figures of one bundle; to be called in a process of its own."""
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    bundle = Bundle.load(path)
    verified = time.perf_counter()
    settings = Settings()
    model = TowerModel(bundle, settings)
    dictionary = load_dictionaries(bundle)["sae"]
    pixels = load_pixels(jpegs(batch), ImagePreprocess(bundle.clip_config))

    def encode(count: int, with_features: bool) -> float:
        started = time.perf_counter()
        unit, _ = model.encode_images(pixels[:count])
        if with_features:
            with torch.inference_mode():
                rows = dictionary.encode_sparse(torch.from_numpy(unit), Modality.IMAGE)
            assert len(rows) == count
        return time.perf_counter() - started

    encode(1, True)
    loaded = time.perf_counter()
    for count in (1, batch):
        encode(count, True)
    times: dict[tuple[int, bool], list[float]] = {(c, f): [] for c in (1, batch) for f in (False, True)}
    for _ in range(rounds):
        for key, found in times.items():
            found.append(encode(*key))
    info = model.info()
    result: dict[str, Any] = {
        "bundle": bundle.id,
        "model_parameters": info.parameters,
        "embed_dim": info.embed_dim,
        "n_features": dictionary.n_features,
        "files_mb": sum(entry.bytes for entry in bundle.manifest.files.values()) / 1e6,
        "dictionary_mb": sum(p.numel() * p.element_size() for p in dictionary.parameters()) / 1e6,
        "verify_s": verified - began,
        "load_s": loaded - verified,
        "resident_gb": process.memory_info().rss / 1e9,
        "resident_of_imports_gb": before / 1e9,
        "backend": info.backend,
        "device": info.device,
        "precision": info.precision,
        "threads": info.threads,
    }
    for count in (1, batch):
        plain, full = times[count, False], times[count, True]
        result[f"images_per_s_{count}"] = count / statistics.median(plain)
        result[f"images_per_s_{count}_with_features"] = count / statistics.median(full)
        result[f"features_cost_{count}"] = float(np.median(np.array(full) / np.array(plain)) - 1)
    return result


def main(
    models: Annotated[str, typer.Option(help="Names of open_clip's models.")] = "ViT-B-32,ViT-L-14",
    features: Annotated[str, typer.Option(help="Features of each; 0 is 16 times the embedding.")] = "0,65536",
    batch: Annotated[int, typer.Option(min=2, help="Images of a batch, beside single ones.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    folder: Annotated[Path, typer.Option(help="Where the bundles are made.")] = OUT / "bundles",
    one: Annotated[
        Path | None, typer.Option(help="Measure this bundle in this process, and print it.")
    ] = None,
) -> None:
    """Measure."""
    if one is not None:
        print(json.dumps(measure(one, batch, rounds)))
        return
    found = []
    table = Table("model", "features", "files MB", "resident GB", "load s", "on")
    for count in (1, batch):
        table.add_column(f"images/s, {count}", justify="right")
        table.add_column("with features", justify="right")
    for name in models.split(","):
        for n in map(int, features.split(",")):
            path = clip_with_features(folder, name, n).path
            command = [sys.executable, "-m", "benchmarks.sizes", "--one", str(path), "--batch", str(batch)]
            done = subprocess.run(
                [*command, "--rounds", str(rounds)], check=True, stdout=subprocess.PIPE, text=True
            )
            row = {"model": name, **json.loads(done.stdout.splitlines()[-1])}
            found.append(row)
            speeds = [
                cell
                for count in (1, batch)
                for cell in (
                    f"{row[f'images_per_s_{count}']:.1f}",
                    f"{row[f'images_per_s_{count}_with_features']:.1f} ({row[f'features_cost_{count}']:+.1%})",
                )
            ]
            where = f"{row['backend']} {row['precision']}, {row['device']}, {row['threads']} threads"
            table.add_row(
                name, f"{row['n_features']:,}", f"{row['files_mb']:,.0f}", f"{row['resident_gb']:.2f}",
                f"{row['load_s']:.1f}", where, *speeds,
            )  # fmt: skip
    Console().print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "sizes.json").write_text(
        json.dumps({"batch": batch, "rounds": rounds, "rows": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
