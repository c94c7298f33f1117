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
from services.modalities import Modality
from services.modality.scores import stack_rows
from training.dictionary_table import load_columns
from training.embeddings import EmbeddingSet

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
            raise SystemExit(f"{embeddings_path} holds embeddings of other towers; run training.embeddings")
        columns = {name: column[embeddings.rows] for name, column in load_columns(corpus).items()}
        woman, man = (embeddings.texts[:, np.searchsorted(embeddings.captions, who)] for who in PEOPLE)
        return cls(embeddings, columns, gender_direction(woman, man))

    @property
    def gender(self) -> np.ndarray:
        """Of each drawing: WOMAN, MAN or UNGENDERED."""
        return np.array([GENDER[g] for g in self.columns["gender"]])

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

    def drawings(self, dictionary: Dictionary, index: np.ndarray) -> Cases:
        """Return drawings as cases; items of one activity or profession, whoever drew it, are one cluster."""
        e = self.embeddings.images[index]
        return Cases(
            e,
            codes(dictionary, e, Modality.IMAGE),
            np.zeros(len(index), bool),
            self.gender[index],
            self.columns["profession"][index].astype(str),
            clusters(self.columns["concept"][index]),
        )

    def texts(self, dictionary: Dictionary) -> Cases:
        """Return captions of gendered people and of ungendered professions, in every template, as cases."""
        wanted = (self.columns["gender"] != "") | (self.columns["profession"] != "")
        wanted &= (self.columns["tone"] == "") & (self.embeddings.part != "test")
        caption, first = np.unique(self.embeddings.caption[wanted], return_index=True)
        row = np.flatnonzero(wanted)[first]
        templates = len(self.embeddings.texts)
        e = self.embeddings.texts[:, caption].reshape(templates * len(caption), -1)
        row = np.tile(row, templates)
        return Cases(
            e,
            codes(dictionary, e, Modality.TEXT),
            np.ones(len(row), bool),
            self.gender[row],
            self.columns["profession"][row].astype(str),
            clusters(self.columns["concept"][row]),
        )


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
