"""Choose size, sparsity and alignment of the dictionaries, on pairs that no dictionary trained on.

``python -m training.dictionaries.grid`` trains the aligned autoencoder with two seeds in each cell of a small grid and
writes ``work/dictionary_grid.json``: the table, the choice and why. One setting is swept at a time, the others being
held at the best so far: size, then weight of the contrastive term, then features an embedding may use. What is measured
is wanted all at once: labels that are resolved, labels that another seed agrees with, features that fire, features of
each label, and retrieval on activations. Of the cells that meet the most of `training.dictionaries.choose.TARGETS` the
one with the least FVU is chosen: fewer features and a stronger term make labels steadier and reconstruction worse, so
no more of them is taken than the targets ask. The test artist has no part in it. An interrupted run goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from services.dictionaries import SAE, load_dictionary
from services.modality.labels import label_agreement
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.dictionaries.choose import TARGETS, alive_features, label_metrics, load_columns, meets
from training.dictionaries.metrics import EvaluationSet, measure
from training.dictionaries.sae import SAETrainer
from training.dictionaries.train import GROUP, load_pairs
from training.modality.score import HeldOutPairs, label_shares, matching_order, score
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.embed import EmbeddingSet

DEFAULT_OUT = Path("work/dictionary_grid.json")
SIZES, WEIGHTS, KEPT = (256, 384, 512), (0.2, 0.1, 0.5), (32, 16, 48)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Cell:
    """One setting of the grid: n, the weight of the contrastive term, and k."""

    n_features: int
    align: float
    k: int

    @property
    def name(self) -> str:
        """A key for tables."""
        return f"n={self.n_features} align={self.align} k={self.k}"


def choose(rows: dict[str, dict[str, Any]]) -> str:
    """Return the cell that meets the most targets; among those, the one with the least FVU."""
    return min(rows, key=lambda name: (-sum(meets(rows[name]).values()), rows[name]["fvu"]))


def train_cell(source: Path, folder: Path, cell: Cell, seed: int, effort: float) -> float:
    """Train and save one autoencoder, the unit of work of a process; returns the processor seconds that it took."""
    torch.set_num_threads(1)
    started = time.process_time()
    embeddings = EmbeddingSet.load(source)
    settings = replace(GROUP, **asdict(cell), seed=seed, steps=round(GROUP.steps * effort))
    made = SAETrainer(load_pairs(embeddings), settings).run(f"{cell.name}/{seed}")
    made.half().save(folder / f"{cell.name}-{seed}", "sae-group", tower_fingerprint=embeddings.fingerprint)
    return time.process_time() - started


def measure_cell(source: Path, corpus: Path, folder: Path, cell: Cell) -> dict[str, Any]:
    """Return the row of one cell, whose dictionaries are trained; the unit of work of a process."""
    torch.set_num_threads(1)
    embeddings, columns = EmbeddingSet.load(source), load_columns(corpus)
    held_out = HeldOutPairs.of(embeddings, columns)
    first, second = (load_dictionary(folder / f"{cell.name}-{seed}", "sae-group") for seed in SEEDS)
    assert isinstance(first, SAE)
    labels = [score(dictionary, held_out).label for dictionary in (first, second)]
    agreement = label_agreement(labels[0], labels[1][matching_order(first, second)])
    pairs = load_pairs(embeddings)
    found = measure(
        first, EvaluationSet.of(embeddings, columns, "validation"), alive_features(first, pairs)
    ).as_dict()
    shares = label_shares(labels[0])
    return {
        **asdict(cell),
        "labels": shares,
        **label_metrics(shares),
        "kappa_seeds": agreement.kappa,
        "kappa_low": agreement.low,
        "kappa_high": agreement.high,
        **{key: found[key] for key in ("fvu", "dead", "r1_codes_kept", "r1_round_trip_kept")},
    }


class Grid:
    """A table of cells that grows, and is kept after each.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        fingerprint = EmbeddingSet.load(arguments.embeddings).fingerprint
        self.document: dict[str, Any] = {"fingerprint": fingerprint, "effort": arguments.effort, "cells": {}}
        if arguments.out.exists():
            earlier = json.loads(arguments.out.read_text())
            if all(earlier[key] == self.document[key] for key in ("fingerprint", "effort")):
                self.document = earlier

    def sweep(self, cells: list[Cell]) -> Cell:
        """Measure the cells that are new, and return the best of these cells."""
        rows, a = self.document["cells"], self.arguments
        new = [cell for cell in cells if cell.name not in rows]
        context = multiprocessing.get_context("spawn")
        with (
            tempfile.TemporaryDirectory() as place,
            ProcessPoolExecutor(a.workers, mp_context=context) as pool,
        ):
            folder = Path(place)
            trained = {
                cell: [pool.submit(train_cell, a.embeddings, folder, cell, seed, a.effort) for seed in SEEDS]
                for cell in new
            }
            for cell, runs in trained.items():
                seconds = sum(run.result() for run in runs)
                row = pool.submit(measure_cell, a.embeddings, a.corpus, folder, cell).result()
                rows[cell.name] = row | {"processor_seconds": round(seconds)}
                print(json.dumps(rows[cell.name]), flush=True)
                self.save()
        best = choose({cell.name: rows[cell.name] for cell in cells})
        return next(cell for cell in cells if cell.name == best)

    def save(self) -> None:
        """Write the table as far as it is."""
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.out.write_text(json.dumps(self.document, indent=1) + "\n")

    def run(self) -> None:
        """Sweep one setting after the other and write the choice."""
        a = self.arguments
        best = Cell(GROUP.n_features, a.weights[0], a.kept[0])
        best = self.sweep([replace(best, n_features=n) for n in a.sizes])
        best = self.sweep([replace(best, align=align) for align in a.weights])
        best = self.sweep([replace(best, k=k) for k in a.kept])
        rows = self.document["cells"]
        row = rows[best.name]
        met = sum(meets(row).values())
        self.document |= {
            "chosen": asdict(best),
            "targets": TARGETS,
            "why": (
                f"{best.name} meets {met} of {len(TARGETS)} targets on held-out pairs, of {len(rows)} settings tried: "
                f"{row['unresolved']:.0%} of labels unresolved, kappa of seeds {row['kappa_seeds']:.2f}, "
                f"{row['r1_codes_kept']:.0%} of R@1 kept on activations, FVU {row['fvu']:.2f}."
            ),
        }
        self.save()
        print(self.document["why"])


def main() -> None:
    """Choose from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="the first is held first")
    parser.add_argument("--kept", type=int, nargs="+", default=KEPT, help="k; the first is held first")
    Grid(parser.parse_args()).run()


if __name__ == "__main__":
    main()
