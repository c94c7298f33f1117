"""Train the dictionaries.

``python -m training.dictionaries.train`` trains every kind on the fit part of ``work/embeddings.npz``, the stability
seeds too, and writes ``work/dictionaries/``; what is already there for the same towers and settings is kept. Size,
sparsity and alignment are those that ``--choice`` names, a file of `training.dictionaries.grid`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from services.dictionaries import SAE, Dictionary, Modality, Neurons, SAEPair, load_dictionary, match_features
from training.dictionaries.ncl import NCLSettings, train_ncl
from training.dictionaries.sae import EmbeddingPairs, SAESettings, SAETrainer
from training.towers.embed import DEFAULT_OUT, EmbeddingSet

DEFAULT_DIR = Path("work/dictionaries")
SEEDS = (0, 1, 2)
# Size, sparsity and the weight of the contrastive term are what `training.dictionaries.grid` chose for the embedded
# bundle.
# Small batches and a high rate: on a few ten thousand pairs the number of steps, not of samples, is what is short.
PLAIN = SAESettings(
    n_features=384,
    steps=900,
    batch=256,
    lr=3e-3,
    decay=0.6,
    dead_after=120,
    lift=0.005,
    revive_at=(0.05, 0.1, 0.2, 0.35, 0.5),
)
GROUP = replace(PLAIN, align=0.2)
# A half sees one modality, so twice the features cost it no more than the others pay for both.
PAIR = replace(PLAIN, n_features=768)
Recipe: TypeAlias = SAESettings | NCLSettings | None
RECIPES: dict[str, Recipe] = {
    "neurons": None,
    "sae": PLAIN,
    "sae-group": GROUP,
    "sae-pair": PAIR,
    "ncl": NCLSettings(),
}


def recipes(choice: Path | None) -> dict[str, Recipe]:
    """Return the hyperparameters of each kind, with size, sparsity and alignment as a grid chose them.

    All autoencoders take the chosen n and k, so that they can be compared; `sae-pair` twice the n, for a half sees one
    modality. Without a choice they are those of the embedded bundle.
    """
    if choice is None:
        return dict(RECIPES)
    chosen = json.loads(choice.read_text())["chosen"]
    n, k = chosen["n_features"], chosen["k"]
    return RECIPES | {
        "sae": replace(PLAIN, n_features=n, k=k),
        "sae-group": replace(GROUP, n_features=n, k=k, align=chosen["align"]),
        "sae-pair": replace(PAIR, n_features=2 * n, k=k),
    }


# Pairs on which the two halves of `sae-pair` are matched.
MATCH_PAIRS = 8000


def load_pairs(embeddings: EmbeddingSet) -> EmbeddingPairs:
    """Return the fit part: drawings and their augmented views, captions in each template and averaged."""
    fit = embeddings.where("fit")
    wordings = np.concatenate([embeddings.texts, embeddings.mean_texts()[None]])
    return EmbeddingPairs(
        images=torch.from_numpy(np.concatenate([embeddings.images[fit], embeddings.view_images])),
        caption=torch.from_numpy(np.concatenate([embeddings.caption[fit], embeddings.view_caption])),
        texts=torch.from_numpy(wordings),
    )


def train_pair(
    pairs: EmbeddingPairs, settings: SAESettings, label: str = "", tell: Callable[[float], None] | None = None
) -> SAEPair:
    """Train one autoencoder a modality and match their features over true pairs."""
    sides: dict[Modality, SAE] = {}
    for modality in Modality:
        only = replace(settings, modalities=(modality.value,))
        sides[modality] = SAETrainer(pairs, only).run(f"{label} {modality.value}", tell)
    generator = torch.Generator().manual_seed(settings.seed)
    image, text = pairs.batch(MATCH_PAIRS, generator)
    with torch.no_grad():
        z_image = sides[Modality.IMAGE].encode(image, Modality.IMAGE)
        z_text = sides[Modality.TEXT].encode(text, Modality.TEXT)
    order, _ = match_features(z_image, z_text)
    return SAEPair.matched(sides[Modality.IMAGE], sides[Modality.TEXT], order).eval().requires_grad_(False)


def train(
    name: str,
    pairs: EmbeddingPairs,
    settings: Recipe,
    tell: Callable[[float], None] | None = None,
) -> Dictionary:
    """Train one dictionary of `RECIPES`; `tell` is told each step."""
    if settings is None:
        return Neurons(pairs.images.shape[1])
    label = f"{name}/{settings.seed}"
    if isinstance(settings, NCLSettings):
        return train_ncl(pairs, settings, label, tell)
    if name == "sae-pair":
        return train_pair(pairs, settings, label, tell)
    return SAETrainer(pairs, settings).run(label, tell)


def is_trained(folder: Path, name: str, fingerprint: str, settings: Recipe) -> bool:
    """Return whether `folder` holds the dictionary for these towers and settings."""
    path = folder / f"{name}.json"
    if not path.exists():
        return False
    document = json.loads(path.read_text())
    recorded = document["training"].get("settings")
    return document["tower_fingerprint"] == fingerprint and recorded == _as_json(settings)


def train_and_save(
    source: Path, out: Path, name: str, seed: int, effort: float = 1.0, choice: Path | None = None
) -> str:
    """Train one dictionary and save it in half precision; the unit of work of a process.

    Seed 0 is the one that ships and lies in `out` itself, the others in ``out/seed<i>``. `effort` is the share of the
    recipe's steps that is taken, `choice` as for `recipes`.
    """
    recipe = recipes(choice)[name]
    settings = None if recipe is None else replace(recipe, seed=seed, steps=round(recipe.steps * effort))
    folder = out if seed == 0 else out / f"seed{seed}"
    embeddings = EmbeddingSet.load(source)
    if is_trained(folder, name, embeddings.fingerprint, settings):
        return f"{name}/{seed} is current"
    torch.set_num_threads(1)
    started = time.monotonic()
    dictionary = train(name, load_pairs(embeddings), settings)
    seconds = round(time.monotonic() - started, 1)
    record = {
        "recipe": name,
        "settings": _as_json(settings),
        "fit_drawings": int((embeddings.part == "fit").sum()),
        "fit_views": len(embeddings.view_images),
        "seconds": seconds,
    }
    # Half floats on disk; every figure is measured on what is read back from there.
    dictionary.half().save(folder, name, tower_fingerprint=embeddings.fingerprint, training=record)
    return f"{name}/{seed} trained in {seconds} s"


def load_all(folder: Path) -> dict[str, Dictionary]:
    """Load the dictionaries of `RECIPES` that `folder` has."""
    return {name: load_dictionary(folder, name) for name in RECIPES if (folder / f"{name}.json").exists()}


def _as_json(settings: Recipe) -> dict | None:
    return None if settings is None else json.loads(json.dumps(asdict(settings)))


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--out", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of each kind, for stability")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--choice", type=Path, help="what training.dictionaries.grid wrote")
    arguments = parser.parse_args()
    # The kinds that ship first, so that an interrupted run leaves a whole bundle; long ones ahead of short ones.
    jobs = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in ("sae-pair", "sae-group", "sae", "ncl", "neurons")
        if seed == 0 or RECIPES[name] is not None
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = [
            pool.submit(
                train_and_save,
                arguments.embeddings,
                arguments.out,
                name,
                seed,
                arguments.effort,
                arguments.choice,
            )
            for name, seed in jobs
        ]
        for future in futures:
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()
