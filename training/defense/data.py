"""The drawings of the study: what the detector is calibrated on, what it is judged on, and the label texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from training.defense.victim import to_images
from training.towers.embed import EmbeddingSet
from training.towers.pairs import Corpus


@dataclass(frozen=True)
class Drawings:
    """Drawings with their true label.

    Attributes
    ----------
    images : float32 tensor, shape (B, 3, H, W)
        At the tower's size, in [0, 1].
    truth : int64 array, shape (B,)
        Place of the concept among the labels of the study.
    """

    images: Float[Tensor, "B 3 H W"]
    truth: Int[np.ndarray, " B"]

    def first(self, count: int) -> Drawings:
        """Return the first `count` drawings."""
        return Drawings(self.images[:count], self.truth[:count])


@dataclass(frozen=True)
class StudyData:
    """Everything that the study is made on.

    Attributes
    ----------
    clean_units : float32 array, shape (N, d)
        Embeddings of the training drawings, for the statistics of features.
    calibration, evaluation : Drawings
        Halves of the validation drawings without skin tone, no concept in both.
    calibration_clean, evaluation_clean : float32 tensors, shape (B, 3, H, W)
        The same halves with the drawings that have a skin tone.
    test : Drawings
        Of openmoji, whose concepts are among the labels: to be reported on only.
    labels : tuple of str
        Concepts of the validation drawings: what accuracy is among.
    texts : float32 tensor, shape (labels, d)
        Their unit embeddings.
    bundled : tuple of str
        Concepts of all drawings that were trained on or validated on: what the bundle brings.
    bundled_units : float32 array, shape (bundled, d)
        Their unit embeddings.
    """

    clean_units: Float[np.ndarray, "N d"]
    calibration: Drawings
    evaluation: Drawings
    calibration_clean: Float[Tensor, "B 3 H W"]
    evaluation_clean: Float[Tensor, "B 3 H W"]
    test: Drawings
    labels: tuple[str, ...]
    texts: Float[Tensor, "labels d"]
    bundled: tuple[str, ...]
    bundled_units: Float[np.ndarray, "bundled d"]


def split_by_concept(concepts: np.ndarray, seed: int) -> np.ndarray:
    """Return which drawings are in the first half: every other concept of a random order."""
    names = np.unique(concepts)
    first = np.random.default_rng(seed).permutation(names)[::2]
    return np.isin(concepts, first)


def load(
    embeddings: Path, corpus_dir: Path, fingerprint: str, size: tuple[int, int], seed: int, test_images: int
) -> StudyData:
    """Read the corpus, at the tower's `size`, and its embeddings.

    Raises
    ------
    SystemExit
        Where the embeddings are of other towers than the bundle's.
    """
    embedded = EmbeddingSet.load(embeddings)
    if embedded.fingerprint != fingerprint:
        raise SystemExit(
            f"{embeddings} holds embeddings of other towers: run python -m training.towers.embed"
        )
    corpus = Corpus.load(corpus_dir)
    columns = corpus.columns
    rng = np.random.default_rng(seed)
    texts, place = embedded.mean_texts(), {caption: i for i, caption in enumerate(embedded.captions)}

    def units(names: np.ndarray) -> np.ndarray:
        return texts[[place[name] for name in names]].astype(np.float32)

    validation = rng.permutation(np.flatnonzero(columns["split"] == "validation"))
    first = split_by_concept(columns["concept"][validation], seed)
    toneless = columns["tone"][validation] == ""
    labels = np.unique(columns["concept"][validation])

    def drawings(rows: np.ndarray) -> Drawings:
        return Drawings(_pictures(corpus, size, rows), np.searchsorted(labels, columns["concept"][rows]))

    test = np.flatnonzero(
        (columns["split"] == "test") & (columns["tone"] == "") & np.isin(columns["concept"], labels)
    )
    bundled = np.unique(columns["concept"][np.isin(columns["split"], ["train", "validation"])])
    return StudyData(
        clean_units=embedded.images[embedded.where("fit", "pool")],
        calibration=drawings(validation[first & toneless]),
        evaluation=drawings(validation[~first & toneless]),
        calibration_clean=_pictures(corpus, size, validation[first]),
        evaluation_clean=_pictures(corpus, size, validation[~first]),
        test=drawings(rng.permutation(test)[:test_images]),
        labels=tuple(labels.tolist()),
        texts=torch.from_numpy(units(labels)),
        bundled=tuple(bundled.tolist()),
        bundled_units=units(bundled),
    )


def _pictures(corpus: Corpus, size: tuple[int, int], rows: np.ndarray) -> Tensor:
    images = to_images(np.stack([corpus.plain[row] for row in rows]))
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
