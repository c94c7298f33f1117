"""Assemble a bundle from what the earlier steps left in ``work/``.

``python -m training.build.embedded`` writes ``bundles/emoji``: towers, dictionaries, modality tables, cards, samples,
quantiles, the report and the manifest that vouches for every byte. It takes seconds; `training.build.embedded_steps`
runs the steps before it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from services.bundle.load import SAMPLES, Bundle, refresh_manifest, write_manifest
from services.bundle.manifest import Licence
from services.dictionaries import Modality
from services.imaging.statistics import ActivationStatistics
from training.build.assemble import TABLES, copy_folders, copy_towers, in_place_of, without_nan
from training.build.finish import PACKAGES as BUILD_PACKAGES
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.corpus.sets import ALL_SETS, Role, licences
from training.corpus.svg import document, rasterise
from training.dictionaries.choose import load_columns
from training.towers.embed import DEFAULT_CLIP, EmbeddingSet

DEFAULT_OUT = Path("bundles/emoji")
WORK = Path("work")
SAMPLE_COUNT = 24
SAMPLE_SIDE = 128
# Mean darkness, 0 to 255.
MIN_INK = 4.0
DESCRIPTION = (
    "A small CLIP trained from scratch on open emoji and icon drawings, dictionaries of its features, and what is "
    "known of each feature: which modality it is about, what it fires on, and its name."
)
COMMANDS = (
    "npm ci --prefix training/corpus",
    "python -m training.corpus.build",
    "python -m training.towers.train",
    "python -m training.towers.embed",
    "python -m training.diffusion.autoencoder",
    "python -m training.diffusion.train",
    "python -m training.build.embedded_steps --test",
)
PACKAGES = (*BUILD_PACKAGES, "resvg-py")


def has_ink(pixels: np.ndarray) -> np.ndarray:
    """Return which pictures, uint8 [n, h, w, 3], can be seen: some glyphs are drawn in white on nothing."""
    return (255 - pixels.astype(np.int64)).mean((1, 2, 3)) > MIN_INK


def pick_samples(
    columns: dict[str, np.ndarray], pictures: np.ndarray, count: int = SAMPLE_COUNT, seed: int = 0
) -> np.ndarray:
    """Return corpus rows of held-out drawings to ship: every artist and category in turn, no concept twice.

    Drawings whose sibling was trained on are left out, those with skin tones, which would look alike, and those
    that cannot be seen on white.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(
        (columns["split"] == "validation") & ~columns["sibling"].astype(bool) & (columns["tone"] == "")
    )
    rows = rows[has_ink(pictures[rows])]
    rows = rng.permutation(rows)
    chosen: list[int] = []
    uses: dict[str, int] = {}
    concepts: set[str] = set()
    while len(chosen) < count:
        free = [
            r for r in rows if columns["concept"][r] not in concepts and columns["category"][r] != "Flags"
        ]
        if not free:
            break
        # Whoever was used least so far: artists first, then categories.
        best = min(free, key=lambda r: (uses.get(columns["set"][r], 0), uses.get(columns["category"][r], 0)))
        chosen.append(int(best))
        concepts.add(columns["concept"][best])
        for key in (columns["set"][best], columns["category"][best]):
            uses[key] = uses.get(key, 0) + 1
    return np.array(chosen)


def write_samples(bundle: Path, columns: dict[str, np.ndarray], rows: np.ndarray) -> None:
    """Rasterise the samples and write them with their captions and artists."""
    sets = {icon_set.name: icon_set for icon_set in ALL_SETS}
    folder = (bundle / SAMPLES).parent
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for row in rows:
        icon_set, slug = sets[columns["set"][row]], columns["name"][row]
        icons = icon_set.read("icons")
        pixels = rasterise(document(icons["icons"][slug], icons), SAMPLE_SIDE)
        path = folder / f"{icon_set.name}-{columns['slug'][row]}.png"
        Image.fromarray(pixels).save(path, optimize=True)
        relative = path.relative_to(bundle).as_posix()
        entries.append({"path": relative, "caption": str(columns["caption"][row]), "artist": icon_set.name})
    (bundle / SAMPLES).write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def bundle_licences() -> list[Licence]:
    """Return the licences of everything the weights saw and of the drawings that ship."""
    use = {
        Role.TRAIN.value: "drawings the towers and dictionaries learnt from; samples and thumbnails show some",
        Role.AUXILIARY.value: "drawings the towers learnt from",
    }
    sets = [
        Licence(
            row["licence"],
            f"{row['name']} by {row['author']}: {use[row['role']]}",
            f"{row['name']} {row['version']}",
        )
        for row in licences()
        if row["role"] in use
    ]
    return [Licence("Apache-2.0", "weights, tables and report of this bundle"), *sets]


def training_minutes(entries: list[dict[str, Any]]) -> float:
    """Return the minutes of all runs in a log; a run that was resumed counts from zero again."""
    minutes = [entry.get("minutes", 0.0) for entry in entries]
    ends = [now for now, after in zip(minutes, [*minutes[1:], 0.0], strict=True) if after < now]
    return float(sum(ends))


def provenance(work: Path, clip: Path) -> dict[str, Any]:
    """Return versions, hours and sizes of what made the bundle."""
    log = clip / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [{}]
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, CPU",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "clip": {
            "steps": entries[-1].get("step"),
            "hours": round(training_minutes(entries) / 60, 2),
            "seed": 0,
        },
        "dictionaries": {"seed": 0, "stability_seeds": [0, 1, 2]},
        "test_set": "openmoji: reported on, never trained on and never chosen by; none of its drawings is in here",
        "judges": "EfficientNet-Lite0 (ImageNet) for images, all-MiniLM-L6-v2 for texts",
    }


def metrics(work: Path) -> dict[str, Any]:
    """Return the figures of the earlier steps, without what only the report shows."""
    result: dict[str, Any] = {}
    for name in ("retrieval", "dictionary_grid", "dictionaries", "modality"):
        path = work / f"{name}.json"
        if path.exists():
            result[name] = json.loads(path.read_text())
    for summary in result.get("modality", {}).values():
        summary.pop("mds_histogram", None)
    return without_nan(result)


def assemble(work: Path, clip: Path, corpus: Path, out: Path) -> Bundle:
    """Write the bundle beside its place, verify it, and then put it there."""
    with in_place_of(out) as part:
        copy_towers(clip, part)
        copy_folders(work, part, TABLES)
        columns = load_columns(corpus)
        pictures = np.load(corpus / "plain.npy", mmap_mode="r")
        write_samples(part, columns, pick_samples(columns, pictures))
        if (work / "report.html").exists():
            shutil.copyfile(work / "report.html", part / "report.html")
        found = metrics(work)
        write_manifest(
            part,
            name=out.name,
            description=DESCRIPTION,
            licences=bundle_licences(),
            default_dictionary=found["dictionaries"]["default"],
            provenance=provenance(work, clip),
            training_commands=COMMANDS,
            metrics=found,
        )
        write_quantiles(Bundle.load(part, verify=False), EmbeddingSet.load(work / "embeddings.npz"))
        refresh_manifest(part)
    return Bundle.load(out, verify=False)


@torch.inference_mode()
def write_quantiles(bundle: Bundle, embeddings: EmbeddingSet) -> None:
    """Write the activation quantiles of every dictionary on the training pairs, which edits to a quantile need."""
    index = embeddings.where("fit", "pool")
    sides = (
        (Modality.IMAGE, torch.from_numpy(embeddings.images[index])),
        (Modality.TEXT, torch.from_numpy(embeddings.mean_texts()[np.unique(embeddings.caption[index])])),
    )
    for name in bundle.dictionary_names:
        dictionary = bundle.dictionary(name)
        z = [torch.cat([dictionary.encode(p, m) for p in e.split(2048)]).numpy() for m, e in sides]
        ActivationStatistics.measure(*z).write(
            bundle.path / "steering" / f"{name}.safetensors",
            dictionary=name,
            tower_fingerprint=embeddings.fingerprint,
        )


def main() -> None:
    """Assemble from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--clip", type=Path, default=DEFAULT_CLIP)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    bundle = assemble(arguments.work, arguments.clip, arguments.corpus, arguments.out)
    total = sum(entry.bytes for entry in bundle.manifest.files.values())
    print(f"{bundle.id}: {len(bundle.manifest.files)} files, {total / 1e6:.1f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
