"""Modality tables, names and monosemanticity of every dictionary.

``python -m training.modality.score`` writes ``work/modality/<name>.parquet`` and ``work/modality.json``. All of it is
said on pairs that no dictionary trained on: a share of the training drawings (which the towers did see) and the
validation drawings (new to the towers too), each drawing with its caption in a template drawn at random. Names are
found on the fit part and judged on these pairs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linear_sum_assignment

from services.dictionaries import Dictionary, Modality, load_dictionary
from services.modality.labels import label_agreement
from services.modality.monosemanticity import (
    emb_sim,
    embedding_features,
    mean_over_features,
    population_similarity,
    top_samples,
    win_rate,
)
from services.modality.naming import Names, name_features
from services.modality.table import ModalitySettings, score_pairs, split_half_agreement
from services.modality.tables import Label, ModalityTable
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.corpus.names import spoken
from training.dictionaries.choose import load_columns
from training.dictionaries.train import DEFAULT_DIR, RECIPES
from training.modality.judges import DEFAULT_OUT as JUDGES
from training.modality.judges import Judges
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.embed import EmbeddingSet

DEFAULT_OUT = Path("work/modality")
SUMMARY = Path("work/modality.json")
HELD_OUT = ("pool", "validation")
TOP = (10, 20, 30, 50)
# The m whose scores are stored with each feature.
STORED_TOP = 10
# Embeddings that stand in for features, as the baseline of EmbSim and WinRate.
BASELINE_FEATURES = 512
# Inputs encoded at once.
CHUNK = 2048
# Beyond this a feature is named by the texts it fires on, not by the images.
NAMED_BY_TEXT = 0.25
# Fit pairs that names are found on, drawn at random: more find no other names, and take memory.
NAMED_ON = 30_000
# The share of live features with a name that is at least so good is reported.
GOOD_AUC = 0.8


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that no dictionary trained on, by the training artists.

    Attributes
    ----------
    index : np.ndarray
        Rows of the embeddings, int64 [n].
    images, texts : torch.Tensor
        Unit embeddings of both sides, float32 [n, d].
    captions : np.ndarray
        str [n].
    concepts : np.ndarray
        Number of the concept: drawings of one concept are not independent, int64 [n].
    drawn : np.ndarray
        Number of the concept as drawn by one family of artists: what is independent where concepts were not held out,
        int64 [n].
    new_to_towers : np.ndarray
        Whether the towers did not train on the pair either, bool [n].
    """

    index: np.ndarray
    images: torch.Tensor
    texts: torch.Tensor
    captions: np.ndarray
    concepts: np.ndarray
    drawn: np.ndarray
    new_to_towers: np.ndarray

    @classmethod
    def of(cls, embeddings: EmbeddingSet, columns: dict[str, np.ndarray]) -> HeldOutPairs:
        """Collect them."""
        index = embeddings.where(*HELD_OUT)
        concept = columns["concept"][embeddings.rows[index]].astype(str)
        family = columns["family"][embeddings.rows[index]].astype(str) if "family" in columns else ""
        return cls(
            index=index,
            images=torch.from_numpy(embeddings.images[index]),
            texts=torch.from_numpy(embeddings.pair_texts(index)),
            captions=embeddings.captions[embeddings.caption[index]],
            concepts=np.unique(concept, return_inverse=True)[1],
            drawn=np.unique(np.char.add(np.char.add(concept, "|"), family), return_inverse=True)[1],
            new_to_towers=embeddings.part[index] == "validation",
        )


@torch.no_grad()
def activations(dictionary: Dictionary, e: torch.Tensor, modality: Modality) -> sp.csr_array | np.ndarray:
    """Return z [n, features], sparse where at most an eighth of its first `CHUNK` rows is not zero."""
    chunks = e.split(CHUNK)
    first = dictionary.encode(chunks[0], modality).numpy()
    if np.count_nonzero(first) * 8 > first.size:
        z = np.empty((len(e), first.shape[1]), first.dtype)
        z[: len(first)] = first
        for number, chunk in enumerate(chunks[1:], 1):
            z[number * CHUNK : number * CHUNK + len(chunk)] = dictionary.encode(chunk, modality).numpy()
        return z
    # Made sparse one by one: all of them dense would be n x features floats, gigabytes for what takes megabytes.
    parts = [sp.csr_array(first)]
    parts += [sp.csr_array(dictionary.encode(chunk, modality).numpy()) for chunk in chunks[1:]]
    return sp.vstack(parts, format="csr")


def name_by_side(
    dictionary: Dictionary,
    embeddings: EmbeddingSet,
    held_out: HeldOutPairs,
    mds: np.ndarray,
    say: Callable[[str], str] = str,
) -> Names:
    """Name every feature by the side it belongs to: texts where its MDS is low, else images.

    `say` writes a caption as one would say it.
    """
    said = {caption: say(caption) for caption in embeddings.captions.tolist()}
    fit = embeddings.where("fit")
    fit = np.sort(np.random.default_rng(0).permutation(fit)[:NAMED_ON])
    distinct = np.unique(embeddings.caption[fit])
    judged = [said[caption] for caption in held_out.captions.tolist()]
    by_image = name_features(
        activations(dictionary, torch.from_numpy(embeddings.images[fit]), Modality.IMAGE),
        [said[caption] for caption in embeddings.captions[embeddings.caption[fit]].tolist()],
        activations(dictionary, held_out.images, Modality.IMAGE),
        judged,
        held_out.drawn,
    )
    by_text = name_features(
        activations(dictionary, torch.from_numpy(embeddings.texts[0][distinct]), Modality.TEXT),
        [said[caption] for caption in embeddings.captions[distinct].tolist()],
        activations(dictionary, held_out.texts, Modality.TEXT),
        judged,
        held_out.concepts,
    )
    use_text = np.nan_to_num(mds, nan=0.5) < NAMED_BY_TEXT
    return Names(
        *(np.where(use_text, getattr(by_text, f.name), getattr(by_image, f.name)) for f in fields(Names))
    )


def monosemanticity(
    dictionary: Dictionary, embeddings: EmbeddingSet, judges: Judges, concept: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Score every feature on held-out images and captions, and embeddings of the fit part as if they were features.

    `concept` names that of each image of `embeddings`, str [n]: of one concept a feature's strongest sample counts
    alone.

    Returns
    -------
    columns : dict
        ``emb_sim_image`` and so on at `STORED_TOP`, float64 [n].
    means : dict
        By modality: "random", and by measure and m the mean over features with its interval and the number of features,
        of the dictionary and, under "embeddings", of the baseline.
    """
    where = np.searchsorted(embeddings.rows, judges.rows)
    known = np.searchsorted(embeddings.captions, judges.captions)
    numbers = np.unique(concept, return_inverse=True)[1]
    # A caption's concept is that of the first image with it.
    first = np.zeros(len(embeddings.captions), np.int64)
    first[embeddings.caption[::-1]] = np.arange(len(embeddings.caption))[::-1]
    fit = embeddings.where("fit")
    sides = {
        Modality.IMAGE: (embeddings.images[where], embeddings.images[fit], judges.images, numbers[where]),
        Modality.TEXT: (
            embeddings.texts[0][known],
            embeddings.texts[0][np.unique(embeddings.caption[fit])],
            judges.texts,
            numbers[first[known]],
        ),
    }
    columns: dict[str, np.ndarray] = {}
    means: dict[str, Any] = {}
    for modality, (e, trained_on, judge, groups) in sides.items():
        if len(e) < 2:
            continue
        found = means[modality.value] = {"random": population_similarity(judge)}
        z = activations(dictionary, torch.from_numpy(e), modality)
        scores = _monosemantic(z, judge, groups)
        baseline = _monosemantic(embedding_features(e, trained_on, BASELINE_FEATURES), judge, groups)
        found |= _means(scores) | {"embeddings": _means(baseline)}
        columns |= {f"{measure}_{modality.value}": by_m[STORED_TOP] for measure, by_m in scores.items()}
    return columns, means


def _monosemantic(
    z: sp.csr_array | np.ndarray, judge: np.ndarray, groups: np.ndarray
) -> dict[str, dict[int, np.ndarray]]:
    """Return EmbSim and WinRate of each feature by m."""
    scores: dict[str, dict[int, np.ndarray]] = {"emb_sim": {}, "win_rate": {}}
    for m in TOP:
        samples, enough = top_samples(z, m, groups)
        scores["emb_sim"][m] = emb_sim(samples, enough, judge)
        scores["win_rate"][m] = win_rate(samples, enough, judge)
    return scores


def _means(scores: dict[str, dict[int, np.ndarray]]) -> dict[str, dict[str, Any]]:
    return {
        measure: {str(m): asdict(mean_over_features(values)) for m, values in by_m.items()}
        for measure, by_m in scores.items()
    }


def label_shares(labels: np.ndarray) -> dict[str, float]:
    """Return the share of features of each label."""
    count = Counter(labels.tolist())
    return {label.value: round(count[label.value] / len(labels), 4) for label in Label}


def matching_order(first: Dictionary, second: Dictionary) -> np.ndarray:
    """Return for each feature that of another seed, int64 [n], matched by decoder rows (Hungarian)."""
    rows = [
        torch.cat([torch.nn.functional.normalize(d.decoder_rows(m).float(), dim=-1) for m in Modality], 1)
        for d in (first, second)
    ]
    return linear_sum_assignment((rows[0] @ rows[1].T).numpy(), maximize=True)[1]


def seed_agreement(folder: Path, name: str, table: ModalityTable, pairs: HeldOutPairs) -> dict | None:
    """Return how far labels agree with those of another seed, features matched by their decoder rows."""
    other_folder = folder / "seed1"
    if not (other_folder / f"{name}.json").exists():
        return None
    first, second = load_dictionary(folder, name), load_dictionary(other_folder, name)
    if first.embed_dim != second.embed_dim or first.n_features != second.n_features:
        return None
    other = score(second, pairs)
    return asdict(label_agreement(table.label, other.label[matching_order(first, second)]))


def score(dictionary: Dictionary, pairs: HeldOutPairs, keep: np.ndarray | None = None) -> ModalityTable:
    """Return the modality table of a dictionary on the held-out pairs, or on some of them."""
    keep = np.arange(len(pairs.index)) if keep is None else np.flatnonzero(keep)
    return score_pairs(
        activations(dictionary, pairs.images[keep], Modality.IMAGE),
        activations(dictionary, pairs.texts[keep], Modality.TEXT),
        ModalitySettings(),
        groups=pairs.concepts[keep],
    )


def describe_dictionary(
    name: str, source: Path, corpus: Path, folder: Path, judges_path: Path, out: Path
) -> dict[str, Any]:
    """Write the modality table of one dictionary and return its summary; the unit of work of a process."""
    torch.set_num_threads(1)
    embeddings, columns, judges = EmbeddingSet.load(source), load_columns(corpus), Judges.load(judges_path)
    pairs = HeldOutPairs.of(embeddings, columns)
    concept = columns["concept"][embeddings.rows]
    table, summary = describe(name, folder, embeddings, pairs, (judges, concept), spoken)
    table.write(out / f"{name}.parquet")
    return summary


def describe(
    name: str,
    folder: Path,
    embeddings: EmbeddingSet,
    pairs: HeldOutPairs,
    judges: tuple[Judges, np.ndarray] | None = None,
    say: Callable[[str], str] = str,
) -> tuple[ModalityTable, dict[str, Any]]:
    """Return the modality table of one dictionary, with names, and a summary as JSON values.

    Parameters
    ----------
    name, folder : str, Path
        The dictionary and where it is, with those of other seeds below.
    embeddings : EmbeddingSet
        Names are found on its fit part.
    pairs : HeldOutPairs
        All else is said on these.
    judges : tuple of Judges and str array, or None
        Judge whether a feature is about one thing, with the concept of each image of `embeddings`; None leaves that
        undefined.
    say : callable
        Writes a caption as one would say it, for names.
    """
    dictionary = load_dictionary(folder, name)
    table = score(dictionary, pairs)
    z_image = activations(dictionary, pairs.images, Modality.IMAGE)
    z_text = activations(dictionary, pairs.texts, Modality.TEXT)
    halves = split_half_agreement(z_image, z_text, ModalitySettings(), groups=pairs.concepts)
    unseen = score(dictionary, pairs, pairs.new_to_towers) if pairs.new_to_towers.any() else None
    names = name_by_side(dictionary, embeddings, pairs, table.mds_energy, say)
    scores, means = ({}, None) if judges is None else monosemanticity(dictionary, embeddings, *judges)
    table = table.with_columns(
        name=names.name,
        name_npmi=names.npmi,
        name_auc=names.auc,
        name_auc_low=names.low,
        name_auc_high=names.high,
        name_count=names.count,
        **scores,
    )
    live = table.label != Label.DEAD.value
    shuffled = np.random.default_rng(0).permutation(len(pairs.index))
    null = score_pairs(z_image, z_text[shuffled], ModalitySettings(resamples=200), groups=None)
    agreement = None if unseen is None else asdict(label_agreement(table.label, unseen.label))
    named = table.name_auc[table.name != ""]
    return table, {
        "pairs": len(pairs.index),
        "concepts": int(pairs.concepts.max()) + 1,
        "pairs_new_to_towers": int(pairs.new_to_towers.sum()),
        "labels": label_shares(table.label),
        "paper_labels": label_shares(table.paper_label),
        "cross_on_shuffled_pairs": label_shares(null.label)[Label.CROSS.value],
        "significant": float(table.coactivation_significant[live].mean()) if live.any() else 0.0,
        "kappa_halves": asdict(halves),
        "kappa_new_to_towers": agreement,
        "kappa_seeds": seed_agreement(folder, name, table, pairs),
        "mds_histogram": np.histogram(table.mds_energy[live], bins=32, range=(0, 1))[0].tolist(),
        "named": float((table.name[live] != "").mean()) if live.any() else 0.0,
        "name_auc_median": float(np.median(named)) if len(named) else float("nan"),
        "named_well": float(((table.name != "") & (table.name_auc >= GOOD_AUC))[live].mean())
        if live.any()
        else 0.0,
        "monosemanticity": means,
    }


def main() -> None:
    """Describe all dictionaries from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--dictionaries", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--judges", type=Path, default=JUDGES)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    paths = (arguments.embeddings, arguments.corpus, arguments.dictionaries, arguments.judges, arguments.out)
    names = [name for name in RECIPES if (arguments.dictionaries / f"{name}.json").exists()]
    summary = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = {name: pool.submit(describe_dictionary, name, *paths) for name in reversed(names)}
        for name, future in futures.items():
            summary[name] = future.result()
            shares = summary[name]["labels"]
            print(f"{name} labels {shares} kappa {summary[name]['kappa_halves']['kappa']:.3f}", flush=True)
    text = json.dumps({name: summary[name] for name in names}, indent=1)
    arguments.summary.write_text(text.replace("NaN", "null") + "\n")


if __name__ == "__main__":
    main()
