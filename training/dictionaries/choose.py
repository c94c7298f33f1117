"""The table of all dictionaries, and the choice of the default one.

``python -m training.dictionaries.choose`` measures what ``work/dictionaries/`` holds on the validation part, beside
neurons, PCA and random directions, and writes ``work/dictionaries.json``. ``--test`` adds the test artist: for
reporting, at the very end; the choice reads the validation part only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from services.dictionaries import Dictionary, Modality, load_dictionary
from services.modality.tables import Label, ModalityTable
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.dictionaries.baselines import PCA, pca_for_fvu, random_dictionary
from training.dictionaries.metrics import EvaluationSet, measure, retained, stability
from training.dictionaries.sae import EmbeddingPairs
from training.dictionaries.train import DEFAULT_DIR, GROUP, SEEDS, load_all, load_pairs
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.embed import EmbeddingSet

DEFAULT_OUT = Path("work/dictionaries.json")
MODALITY_DIR = Path("work/modality")
CANDIDATES = ("sae", "sae-group", "sae-pair")
# What a default dictionary should reach on held-out pairs: at most for `AT_MOST`, else at least. Labels of each kind
# are asked for because whoever edits or attacks by label needs features of each.
TARGETS = {"unresolved": 0.3, "kappa_seeds": 0.5, "rarest_label": 0.01, "dead": 0.03, "r1_codes_kept": 0.88}
AT_MOST = ("unresolved", "dead")
CRITERIA = ("r1_round_trip_kept", "r1_codes_kept", "coactive", "stability")


@torch.no_grad()
def alive_features(dictionary: Dictionary, pairs: EmbeddingPairs) -> Tensor:
    """Return which features fire on any fit image or caption wording, bool [n]."""
    alive = torch.zeros(dictionary.n_features, dtype=torch.bool)
    for e, modality in ((pairs.images, Modality.IMAGE), (pairs.texts.flatten(0, 1), Modality.TEXT)):
        for chunk in e.split(4096):
            alive |= (dictionary.encode(chunk, modality) != 0).any(0)
    return alive


def seed_stability(folder: Path, name: str, fingerprint: str) -> float | None:
    """Return the stability of a kind over the seeds that were trained on these towers; None with fewer than two."""
    folders = [folder if seed == 0 else folder / f"seed{seed}" for seed in SEEDS]
    trained = []
    for place in folders:
        path = place / f"{name}.json"
        if path.exists() and json.loads(path.read_text())["tower_fingerprint"] == fingerprint:
            trained.append(load_dictionary(place, name))
    return round(stability(trained), 4) if len(trained) > 1 else None


def label_metrics(shares: Mapping[str, float]) -> dict[str, float]:
    """Return what `TARGETS` ask of the shares of labels."""
    some = (Label.IMAGE, Label.TEXT, Label.CROSS)
    return {
        "unresolved": shares[Label.UNRESOLVED.value],
        "rarest_label": min(shares[label.value] for label in some),
    }


def meets(row: Mapping[str, Any]) -> dict[str, bool]:
    """Return which of the targets a row of figures reaches; one that was not measured is not reached."""
    met = {}
    for key, target in TARGETS.items():
        value = row.get(key)
        met[key] = value is not None and (value <= target if key in AT_MOST else value >= target)
    return met


def choose_default(rows: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Return the default dictionary and why.

    The one that meets the most targets; among those, the one with the best mean rank over R@1 kept after the round
    trip, R@1 kept on activations alone, the share of significantly co-active features, and stability.
    """
    names = [name for name in CANDIDATES if name in rows]
    met = {name: sum(meets(rows[name]).values()) for name in names}
    best = [name for name in names if met[name] == max(met.values())]
    mean_rank = {}
    for name in best:
        ranks = [
            sum((rows[other].get(key) or 0.0) > (rows[name].get(key) or 0.0) for other in names)
            for key in CRITERIA
        ]
        mean_rank[name] = sum(ranks) / len(ranks)
    default = min(best, key=lambda name: mean_rank[name])
    words = ", ".join(
        f"{name} {met[name]} of {len(TARGETS)} targets"
        + (f" (mean rank {mean_rank[name]:.2f})" if name in mean_rank else "")
        for name in names
    )
    return default, f"{default} is the default by the figures on validation pairs: {words}."


def build_table(
    embeddings: EmbeddingSet,
    columns: dict[str, np.ndarray],
    folder: Path,
    modality: Path,
    parts: list[str],
    summaries: Mapping[str, Any],
    pairs: EmbeddingPairs | None = None,
    *,
    n_features: int = GROUP.n_features,
    k: int = GROUP.k,
    other_artist: bool = True,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every dictionary and baseline on each part.

    Parameters
    ----------
    embeddings, columns, folder, modality, parts
        The pairs, the dictionaries, their modality tables, and what to measure on.
    summaries : mapping
        Of `training.modality.score.describe`, by dictionary.
    pairs : EmbeddingPairs or None
        What the dictionaries were trained on; None is the fit part with its views.
    n_features, k : int
        Of the random dictionary, and of PCA.
    other_artist : bool
        See `EvaluationSet.of`.
    tell : callable
        Told a line after each dictionary.
    """
    pairs = load_pairs(embeddings) if pairs is None else pairs
    trained = load_all(folder)
    baselines: dict[str, Dictionary] = {
        f"pca-{k}": PCA(pairs, k),
        "random": random_dictionary(pairs, n_features, k),
    }
    result: dict[str, Any] = {}
    for part in parts:
        evaluation = EvaluationSet.of(embeddings, columns, part, other_artist)
        rows: dict[str, dict[str, Any]] = {}
        for name, dictionary in {**trained, **baselines}.items():
            rows[name] = measure(dictionary, evaluation, alive_features(dictionary, pairs)).as_dict()
            rows[name]["kept"] = retained(dictionary, evaluation)
            tell(f"{part} {name} {rows[name]}")
        if part == "validation":
            fvu = min(rows[name]["fvu"] for name in CANDIDATES if name in rows)
            baselines["pca-same-fvu"] = pca_for_fvu(pairs, fvu)
            dictionary = baselines["pca-same-fvu"]
            rows["pca-same-fvu"] = measure(dictionary, evaluation).as_dict()
            for name in trained:
                rows[name]["stability"] = seed_stability(folder, name, embeddings.fingerprint)
                if (modality / f"{name}.parquet").exists():
                    table = ModalityTable.read(modality / f"{name}.parquet")
                    live = table.label != "DEAD"
                    rows[name]["coactive"] = round(float(table.coactivation_significant[live].mean()), 4)
                if name in summaries:
                    kappa = summaries[name]["kappa_seeds"]
                    rows[name] |= label_metrics(summaries[name]["labels"])
                    rows[name]["kappa_seeds"] = None if kappa is None else kappa["kappa"]
        result[part] = rows
    result["default"], result["why"] = choose_default(result["validation"])
    result["targets"] = {name: meets(result["validation"][name]) for name in CANDIDATES if name in trained}
    result["fingerprint"] = embeddings.fingerprint
    return result


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--dictionaries", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--modality", type=Path, default=MODALITY_DIR)
    parser.add_argument("--summary", type=Path, default=Path("work/modality.json"))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--test", action="store_true", help="also on the test artist: at the very end")
    arguments = parser.parse_args()
    columns = load_columns(arguments.corpus)
    embeddings = EmbeddingSet.load(arguments.embeddings)
    parts = ["validation"] + (["test"] if arguments.test else [])
    sizes = {}
    if (arguments.dictionaries / "sae-group.json").exists():
        group = load_dictionary(arguments.dictionaries, "sae-group")
        sizes = {"n_features": group.n_features, "k": int(group.config()["k"])}
    summaries = json.loads(arguments.summary.read_text()) if arguments.summary.exists() else {}
    table = build_table(
        embeddings, columns, arguments.dictionaries, arguments.modality, parts, summaries, **sizes
    )
    arguments.out.write_text(json.dumps(table, indent=1) + "\n")
    print(table["why"])


def load_columns(corpus: Path) -> dict[str, np.ndarray]:
    """Return the corpus's columns without its pixels."""
    table = pq.read_table(corpus / "corpus.parquet")
    return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}


if __name__ == "__main__":
    main()
