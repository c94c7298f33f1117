"""Measure the towers: retrieval and zero-shot gender, beside nearest neighbours on pixels and on colours.

``python -m training.towers.evaluate`` measures on the validation drawings; ``--test`` adds openmoji, once, at the end.
Writes ``work/retrieval.json`` and prints the same as a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from training.corpus.build import DEFAULT_DIR
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.embed import EmbeddingSet
from training.towers.pairs import Corpus
from training.towers.retrieval import Retrieval, auc_interval, gender_score, ranks, retrieval, summarise

COLOUR_BINS = 6


def pixel_features(pixels: np.ndarray) -> np.ndarray:
    """Return each picture at a quarter of its size as a unit vector of ink, float32 [n, h * w * 3 / 16].

    Parameters
    ----------
    pixels : np.ndarray
        RGB, uint8 [n, h, w, 3]; h and w are multiples of 4.
    """
    n, height, width, _ = pixels.shape
    small = pixels.reshape(n, height // 4, 4, width // 4, 4, 3).mean((2, 4))
    return _unit(255.0 - small.reshape(n, -1))


def colour_features(pixels: np.ndarray) -> np.ndarray:
    """Return the square root of each picture's RGB histogram, whose dot product is the Bhattacharyya coefficient.

    Parameters
    ----------
    pixels : np.ndarray
        RGB, uint8 [n, h, w, 3].

    Returns
    -------
    np.ndarray
        float32 [n, COLOUR_BINS ** 3].
    """
    cell = (pixels.astype(np.int64) * COLOUR_BINS // 256).reshape(len(pixels), -1, 3)
    cell = (cell[..., 0] * COLOUR_BINS + cell[..., 1]) * COLOUR_BINS + cell[..., 2]
    counts = np.stack([np.bincount(row, minlength=COLOUR_BINS**3) for row in cell])
    return np.sqrt(counts / counts.sum(1, keepdims=True)).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32)


class Evaluation:
    """Figures of one set of embeddings on the splits of the corpus, with intervals by concept.

    Parameters
    ----------
    corpus : Corpus
        Pictures and attributes.
    embeddings : EmbeddingSet
        What the towers make of them.
    """

    def __init__(self, corpus: Corpus, embeddings: EmbeddingSet) -> None:
        self.corpus, self.embeddings = corpus, embeddings
        self.captions = embeddings.captions[embeddings.caption]
        self.columns = {name: column[embeddings.rows] for name, column in corpus.columns.items()}
        self.train = embeddings.where("fit", "pool")

    def retrieve(self, index: np.ndarray, candidates: np.ndarray) -> Retrieval:
        """Return recall of the drawings `index` among the captions `candidates`, and the other way round."""
        texts = self.embeddings.mean_texts()[np.searchsorted(self.embeddings.captions, candidates)]
        concepts = self.columns["concept"][index]
        return retrieval(self.embeddings.images[index], self.captions[index], texts, candidates, concepts)

    def neighbours(
        self, index: np.ndarray, candidates: np.ndarray, features: Callable[[np.ndarray], np.ndarray]
    ) -> dict[int, object]:
        """Return recall of naming a drawing as the most similar training drawing of a candidate caption is named."""
        rows = self.embeddings.rows
        named = self.train[np.isin(self.captions[self.train], candidates)]
        queries = features(self.corpus.plain[rows[index]])
        answers = features(self.corpus.plain[rows[named]])
        labels, group = np.unique(self.captions[named], return_inverse=True)
        best = np.full((len(queries), len(labels)), -np.inf, dtype=np.float32)
        np.maximum.at(best.T, group, (queries @ answers.T).T)
        # A caption's score is that of its best drawing; ranks are then counted over captions.
        rank = ranks(best, np.eye(len(labels), dtype=np.float32), self.captions[index], labels)
        return summarise(rank, groups=self.columns["concept"][index])

    def gender(self, index: np.ndarray) -> dict[str, object]:
        """Return the zero-shot AUC of woman against man on drawings whose name says which."""
        gender = self.columns["gender"][index]
        known = index[gender != ""]
        man, woman = self.embeddings.mean_texts()[np.searchsorted(self.embeddings.captions, ["man", "woman"])]
        score = gender_score(self.embeddings.images[known], man, woman)
        women = self.columns["gender"][known] == "woman"
        auc = auc_interval(score, women, self.columns["concept"][known])
        return {"auc": asdict(auc), "n": len(known)}

    def report(self, index: np.ndarray) -> dict[str, object]:
        """Return everything about one set of drawings, their own captions being the candidates."""
        candidates = np.unique(self.captions[index])
        categories = self.columns["category"][index]
        return {
            "towers": asdict(self.retrieve(index, candidates)),
            "pixels": self.neighbours(index, candidates, pixel_features),
            "colours": self.neighbours(index, candidates, colour_features),
            "gender": self.gender(index),
            "by_category": {
                category or "(none)": asdict(self.retrieve(index[categories == category], candidates))
                for category in np.unique(categories)
            },
        }

    def validation(self) -> dict[str, object]:
        """Return the figures on held-out drawings; ``strict`` has no sibling drawing in training."""
        index = self.embeddings.where("validation")
        strict = index[~self.columns["sibling"][index].astype(bool)]
        candidates = np.unique(self.captions[index])
        by_set = {
            str(s): asdict(self.retrieve(index[self.columns["set"][index] == s], candidates))
            for s in np.unique(self.columns["set"][index])
        }
        return self.report(index) | {"strict": asdict(self.retrieve(strict, candidates)), "by_set": by_set}

    def test(self) -> dict[str, object]:
        """Return the figures on the test artist: drawings without skin tone whose caption occurs in training."""
        index = self.embeddings.where("test")
        seen = np.isin(self.captions[index], self.captions[self.train])
        plain = self.columns["tone"][index] == ""
        metrics = self.report(index[seen & plain])
        # Gender does not need a seen caption; every gendered drawing counts.
        return metrics | {"gender": self.gender(index)}


def print_table(name: str, metrics: dict) -> None:
    """Print the main figures of one set of drawings."""
    towers = metrics["towers"]
    print(f"{name}: {towers['queries']} drawings, {towers['candidates']} captions")
    rows = [
        ("image to caption", towers["image_to_text"]),
        ("caption to image", towers["text_to_image"]),
        ("pixel neighbours", metrics["pixels"]),
        ("colour neighbours", metrics["colours"]),
    ]
    if "strict" in metrics:
        rows.insert(1, ("  no sibling trained on", metrics["strict"]["image_to_text"]))
    for label, recalls in rows:
        shown = "  ".join(f"R@{k} {_show(interval)}" for k, interval in recalls.items())
        print(f"  {label:24s} {shown}")
    print(f"  {'woman/man AUC':24s} {_show(metrics['gender']['auc'])} on {metrics['gender']['n']}")
    for category, found in metrics["by_category"].items():
        print(f"  {category:24s} R@1 {_show(found['image_to_text'][1])} on {found['queries']}")


def _show(interval: dict | object) -> str:
    metrics = interval if isinstance(interval, dict) else asdict(interval)
    return f"{metrics['value']:.3f} [{metrics['low']:.3f}, {metrics['high']:.3f}]"


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--out", type=Path, default=Path("work/retrieval.json"))
    parser.add_argument("--test", action="store_true", help="also measure the test artist")
    arguments = parser.parse_args()
    embeddings = EmbeddingSet.load(arguments.embeddings)
    evaluation = Evaluation(Corpus.load(arguments.corpus), embeddings)
    metrics = {"fingerprint": embeddings.fingerprint, "validation": evaluation.validation()}
    print_table("validation", metrics["validation"])
    if arguments.test:
        metrics["test"] = evaluation.test()
        print_table("openmoji", metrics["test"])
    arguments.out.write_text(json.dumps(metrics, indent=1, default=asdict) + "\n")


if __name__ == "__main__":
    main()
