"""Train the dictionaries of a build: each kind and seed is a stage of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from services.dictionaries import Dictionary
from training.build.errors import BuildError
from training.build.selection import Selection, select
from training.build.settings import BuildSettings
from training.dictionaries.ncl import NCLSettings
from training.dictionaries.sae import EmbeddingPairs, SAESettings
from training.dictionaries.train import RECIPES, load_pairs, train

Recipe = SAESettings | NCLSettings | None
MIN_FEATURES = 1024
# Matching two autoencoders compares each feature of one with each of the other, and takes n^3 steps at worst.
MAX_PAIR_FEATURES = 16_384


def features(settings: BuildSettings, embed_dim: int) -> int:
    """Return n of the autoencoders."""
    return settings.features or max(MIN_FEATURES, 8 * embed_dim)


def recipe(name: str, settings: BuildSettings, embed_dim: int, fit: int, seed: int) -> Recipe:
    """Return the hyperparameters of one dictionary: those of the embedded bundle, at this build's size.

    Parameters
    ----------
    name : str
        A key of `RECIPES`.
    settings : BuildSettings
        Of the build.
    embed_dim, fit : int
        d, and the pairs that are trained on.
    seed : int
        Of this training.
    """
    base = RECIPES[name]
    if base is None:
        return None
    steps = settings.steps or max(base.steps, round(settings.epochs * fit / base.batch))
    if isinstance(base, NCLSettings):
        return replace(base, steps=steps, seed=seed)
    n = features(settings, embed_dim)
    if settings.k >= n:
        raise BuildError(f"--k {settings.k} must be less than the {n} features")
    if name == "sae-pair" and n > MAX_PAIR_FEATURES:
        raise BuildError(
            f"sae-pair with {n} features takes too long to match; leave it out by --kind, or take at most "
            f"{MAX_PAIR_FEATURES}"
        )
    return replace(base, n_features=n, k=settings.k, steps=steps, seed=seed)


def units(name: str, made: Recipe) -> int:
    """Return how many steps a training tells; `sae-pair` trains twice."""
    return 0 if made is None else made.steps * (2 if name == "sae-pair" else 1)


def training_pairs(selection: Selection) -> EmbeddingPairs:
    """Return the fit part; captions in one wording as they are, in several also averaged."""
    if len(selection.embeddings.texts) > 1:
        return load_pairs(selection.embeddings)
    embeddings, fit = selection.embeddings, selection.where("fit")
    return EmbeddingPairs(
        images=torch.from_numpy(embeddings.images[fit]),
        caption=torch.from_numpy(embeddings.caption[fit]),
        texts=torch.from_numpy(embeddings.texts),
    )


def train_one(
    store: Path, settings: BuildSettings, name: str, number: int, out: Path, tell: Callable[[float], None]
) -> list[Path]:
    """Train one dictionary, save it in half precision and return its files; the unit of work of a process.

    The first of the seeds lies in `out` itself, the others in ``out/seed<number>``. No times are recorded: the files
    hang on the pairs and the settings alone.
    """
    selection = select(store, settings)
    embeddings = selection.embeddings
    fit = len(selection.where("fit"))
    made = recipe(name, settings, embeddings.images.shape[1], fit, settings.seed + number)
    dictionary: Dictionary = train(name, training_pairs(selection), made, tell)
    folder = out if number == 0 else out / f"seed{number}"
    record = {
        "recipe": name,
        "settings": None if made is None else json.loads(json.dumps(asdict(made))),
        "fit_pairs": fit,
    }
    dictionary.half().save(folder, name, tower_fingerprint=embeddings.fingerprint, training=record)
    return [file for suffix in (".json", ".safetensors") if (file := folder / f"{name}{suffix}").exists()]
