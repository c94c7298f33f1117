"""Every choice of a build, its unit, its default and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

KINDS = ("neurons", "sae", "sae-group", "sae-pair", "ncl")
# Share of the training pairs that no dictionary sees, so that what is said of features is said on other pairs.
POOL = 0.15


@dataclass(frozen=True)
class BuildSettings:
    """What to build, from what, and how.

    Attributes
    ----------
    out : Path
        The bundle; replaced when the new one is whole.
    work : Path
        Everything that a run leaves for the next one: embeddings, finished stages, the list of bad rows.
    model, pretrained, revision
        As for `training.build.towers.fetch_towers`.
    pairs : tuple of Path
        Tables, shards, and folders of them; may be empty where `embeddings` is given.
    max_bad_share : float
        Rows that may be unusable, of all: where there are more something else is wrong than a few files.
    embeddings : Path or None
        A finished store of embeddings of the same towers, instead of embedding the pairs.
    name, description : str
        Of the bundle.
    licences : tuple of str
        SPDX names, of what the bundle holds.
    templates : tuple of str
        Wordings of each caption; "{}" stands for it.
    dtype : str
        "float16" (half the disk; its rounding is far below a dictionary's error) or "float32".
    shard_rows : int
        Pairs a shard: what a kill may cost.
    device : str
        Of the towers: "cpu" or "cuda".
    workers : int
        Processes of one thread each. Results do not depend on how many.
    features : int
        n; 0 is 8 d, at least 1,024.
    k : int
        Features that describe one embedding.
    steps : int
        Optimiser steps of each dictionary; 0 is `epochs` passes over the pairs, at least the recipe's own.
    epochs : float
        See `steps`.
    kinds : tuple of str
        Dictionaries to make, of `KINDS`.
    seeds : int
        Trainings of each kind; from two on, the figures tell how far seeds agree.
    seed : int
        Of everything random; the first of `seeds`.
    fit_limit, table_limit, evaluation_limit : int
        At most so many pairs train the dictionaries, make the modality tables, and judge on each of validation and
        test: they bound memory and time, and precision grows no more.
    bias, defense : bool or None
        Whether to calibrate; None is: where the pairs allow it.
    resamples : int
        Of bootstrap intervals and matched nulls of the bias study.
    attack_images, attack_steps : int
        Size of the attacks that calibrate the defence.
    thumbnails : bool
        Whether small pictures of the pairs go into the bundle.
    samples : int
        Test images that the bundle ships for demonstrations.
    pipeline : str
        A diffusers folder, or ``hf-hub:owner/name`` with `pipeline_revision`; empty for none.
    pipeline_revision : str or None
        Of a pipeline on the hub.
    reference : bool
        Whether the pipeline stays where it is and only its hash goes into the bundle.
    """

    out: Path
    work: Path
    model: str
    pretrained: str = ""
    revision: str | None = None
    pairs: tuple[Path, ...] = ()
    max_bad_share: float = 0.1
    embeddings: Path | None = None
    name: str = ""
    description: str = ""
    licences: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    dtype: str = "float16"
    shard_rows: int = 2048
    device: str = "cpu"
    workers: int = 1
    features: int = 0
    k: int = 32
    steps: int = 0
    epochs: float = 5.0
    kinds: tuple[str, ...] = KINDS
    seeds: int = 1
    seed: int = 0
    fit_limit: int = 200_000
    table_limit: int = 10_000
    evaluation_limit: int = 2_000
    bias: bool | None = None
    defense: bool | None = None
    resamples: int = 1000
    attack_images: int = 32
    attack_steps: int = 10
    thumbnails: bool = True
    samples: int = 12
    pipeline: str = ""
    pipeline_revision: str | None = None
    reference: bool = False

    @property
    def bundle_name(self) -> str:
        """The name, or the folder's with a dash for each character that a name may not have."""
        return self.name or re.sub(r"^\W|[^\w .+-]", "-", self.out.name).lstrip("- .+")[:64] or "bundle"
