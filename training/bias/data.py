"""What the bias study looks at: gendered people and ungendered professions, as drawings and as texts.

Three sets of drawings stay apart: those of the training artists that fit things, their held-out pairs that choose, and
openmoji that is reported. Drawings of ungendered professions by the training artists were seen by the towers; almost
none is held out, and how an artist drew them is the bias itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from services.bias.cases import MAN, UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_direction
from services.dictionaries import Dictionary, sparse_rows
from services.modality.modalities import Modality
from services.modality.scores import stack_rows
from training.dictionaries.choose import load_columns
from training.towers.embed import EmbeddingSet

GENDER = {"woman": WOMAN, "man": MAN, "": UNGENDERED}
PEOPLE = ("woman", "man")
# Artists of one era of a house style, which drew professions as one gender.
ERAS = {
    "noto": "noto, 2015 on",
    "noto-v1": "noto, before",
    "emojione": "emojione, 2014-2017",
    "fxemoji": "fxemoji, 2015",
    "twemoji": "twemoji",
    "fluent-emoji": "fluent, shaded",
    "fluent-emoji-flat": "fluent, flat",
    "openmoji": "openmoji",
}
# Words that say the gender; what is left of a concept is what the person does, and items that share it are a cluster.
GENDERED_WORDS = frozenset(
    [
        "man",
        "woman",
        "men",
        "women",
        "boy",
        "girl",
        "prince",
        "princess",
        "merman",
        "mermaid",
        "mother",
        "father",
    ]
)
MAX_CODES = 4096


@dataclass(frozen=True)
class Captions:
    """The captions that the study looks at.

    Attributes
    ----------
    row : int array, shape (n,)
        Their rows of `EmbeddingSet.captions`, ascending.
    pair : int array, shape (n,)
        The first pair that has each.
    gender : int array, shape (n,)
        WOMAN or MAN where all pairs that have it are; else UNGENDERED.
    """

    row: np.ndarray
    pair: np.ndarray
    gender: np.ndarray


@dataclass(frozen=True)
class StudyData:
    """The corpus as the study sees it.

    Attributes
    ----------
    embeddings : EmbeddingSet
        Of the towers under study.
    columns : dict of str to array
        The corpus's columns, one entry an embedded drawing.
    direction : float array, shape (d,)
        t_F - t_M over the templates.
    """

    embeddings: EmbeddingSet
    columns: dict[str, np.ndarray]
    direction: np.ndarray

    @classmethod
    def load(cls, embeddings_path: Path, corpus: Path, fingerprint: str) -> StudyData:
        """Read the embeddings of the towers with this fingerprint, and the corpus."""
        embeddings = EmbeddingSet.load(embeddings_path)
        if embeddings.fingerprint != fingerprint:
            raise SystemExit(f"{embeddings_path} holds embeddings of other towers; run training.towers.embed")
        columns = {name: column[embeddings.rows] for name, column in load_columns(corpus).items()}
        woman, man = (embeddings.texts[:, np.searchsorted(embeddings.captions, who)] for who in PEOPLE)
        return cls(embeddings, columns, gender_direction(woman, man))

    @property
    def gender(self) -> np.ndarray:
        """Of each drawing: WOMAN, MAN or UNGENDERED."""
        return genders(self.columns["gender"])

    @property
    def said(self) -> dict[str, np.ndarray]:
        """The columns that say what a caption is of."""
        return self.columns

    def people(self, *parts: str) -> np.ndarray:
        """Return the gendered drawings of `parts`."""
        inside = np.isin(self.embeddings.part, parts)
        return np.flatnonzero(inside & (self.columns["gender"] != ""))

    def ungendered_professions(self, *parts: str) -> np.ndarray:
        """Return the drawings of professions without a gender."""
        inside = np.isin(self.embeddings.part, parts)
        return np.flatnonzero(inside & (self.columns["gender"] == "") & (self.columns["profession"] != ""))

    def things(self, part: str) -> np.ndarray:
        """Return the drawings of a part that show no people; of the test artist only captions that were trained on."""
        index = self.embeddings.where(part)
        keep = (self.columns["category"][index] != "People & Body") & (self.columns["gender"][index] == "")
        if part == "test":
            seen = self.embeddings.caption[self.embeddings.where("fit", "pool")]
            keep &= np.isin(self.embeddings.caption[index], seen)
        return index[keep]

    def subjects(self, index: np.ndarray) -> np.ndarray:
        """Return a number for each drawing, shared by those of one artist, activity and skin tone."""
        columns = (self.columns["set"][index], self.columns["tone"][index])
        keys = np.stack(
            [
                *(np.unique(c, return_inverse=True)[1] for c in columns),
                clusters(self.columns["concept"][index]),
            ]
        )
        return np.unique(keys, axis=1, return_inverse=True)[1].ravel()

    def text_subjects(self) -> np.ndarray:
        """Return a number for each gendered text of `texts`, shared by those of one activity; templates average out."""
        found = self.captions()
        pair = found.pair[found.gender != UNGENDERED]
        return np.tile(clusters(self.columns["concept"][pair]), len(self.embeddings.texts))

    def cluster(self, index: np.ndarray) -> np.ndarray:
        """Return a number for each drawing, shared by those of one activity or profession, whoever drew it."""
        return clusters(self.columns["concept"][index])

    def drawings(self, dictionary: Dictionary, index: np.ndarray) -> Cases:
        """Return drawings as cases."""
        e = self.embeddings.images[index]
        return Cases(
            e,
            codes(dictionary, e, Modality.IMAGE),
            np.zeros(len(index), bool),
            self.gender[index],
            self.columns["profession"][index].astype(str),
            self.cluster(index),
        )

    def captions(self) -> Captions:
        """Return the captions of gendered people and of professions, those of test drawings alone left out."""
        wanted, voting = (
            ((columns["gender"] != "") | (columns["profession"] != ""))
            & (columns["tone"] == "")
            & (self.embeddings.part != "test")
            for columns in (self.columns, self.said)
        )
        row, first = np.unique(self.embeddings.caption[wanted], return_index=True)
        gender = agreed(self.embeddings.caption[voting], genders(self.said["gender"][voting]), row)
        return Captions(row, np.flatnonzero(wanted)[first], gender)

    def texts(self, dictionary: Dictionary) -> Cases:
        """Return the captions, in every template, as cases; a caption is of the cluster of its first pair."""
        found = self.captions()
        templates = len(self.embeddings.texts)
        e = self.embeddings.texts[:, found.row].reshape(templates * len(found.row), -1)
        pair = np.tile(found.pair, templates)
        return Cases(
            e,
            codes(dictionary, e, Modality.TEXT),
            np.ones(len(pair), bool),
            np.tile(found.gender, templates),
            self.columns["profession"][pair].astype(str),
            self.cluster(pair),
        )


def genders(names: np.ndarray) -> np.ndarray:
    """Return WOMAN, MAN or UNGENDERED for each of "woman", "man" and ""."""
    return np.array([GENDER[name] for name in names], np.int64)


def agreed(caption: np.ndarray, gender: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the gender of some captions: that of all pairs that have it, UNGENDERED where they differ.

    "a doctor" of a woman and of a man is of neither.

    Parameters
    ----------
    caption, gender : int arrays, shape (pairs,)
        Of pairs.
    wanted : int array, shape (n,)
        Captions that some pair has.
    """
    size = int(caption.max(initial=-1)) + 1
    least, most = np.full(size, max(GENDER.values())), np.full(size, min(GENDER.values()))
    np.minimum.at(least, caption, gender)
    np.maximum.at(most, caption, gender)
    return np.where(least == most, least, UNGENDERED)[wanted]


def activity(concept: str) -> str:
    """Return what is left of a concept without the words that say a gender."""
    return " ".join(word for word in concept.split() if word not in GENDERED_WORDS) or "person"


def clusters(concepts: np.ndarray) -> np.ndarray:
    """Return a number for each concept, the same for both genders of one activity."""
    return np.unique([activity(str(concept)) for concept in concepts], return_inverse=True)[1]


@torch.no_grad()
def codes(dictionary: Dictionary, e: np.ndarray, modality: Modality):
    """Return the activations of embeddings, sparse (N, n)."""
    rows = []
    for chunk in torch.from_numpy(np.ascontiguousarray(e)).split(MAX_CODES):
        rows += sparse_rows(dictionary.encode(chunk, modality))
    return stack_rows(rows, dictionary.n_features)
