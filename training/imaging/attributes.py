"""Attribute directions: sparse changes of activations between drawings of one concept that differ in one thing.

A contrast names the drawings that have an attribute, those that do not, and what the two must share. Its direction
is the mean difference of their embeddings, each concept counting once, as the generator sees it (whitened); orthogonal
matching pursuit over the dictionary's decoder rows makes it sparse, with as many features as the direction of concepts
left out of the fit calls for. Concepts with validation drawings take no part: they are for measuring.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from services.dictionaries.base import Dictionary
from services.imaging.dose import Attribute, AttributeEntry
from services.modality.modalities import Modality
from training.imaging.colour import NAMED, colour_shares
from training.towers.embed import Embedder, EmbeddingSet, as_images
from training.towers.pairs import Corpus

TONES = ("light", "medium", "dark")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
# Categories of things that any artist may give any colour.
THINGS = ("Objects", "Animals & Nature", "Travel & Places", "Food & Drink", "Activities")
GENDERED = {"woman": "*", "man": "*", "women": "**", "men": "**", "person": "*", "people": "**"}
SMILING = frozenset({"smiling", "grinning", "beaming", "joy"})
FROWNING = frozenset({"frowning", "crying", "sad", "disappointed", "weary", "pouting", "angry", "worried"})
# Restyled drawings that are embedded for the contrasts of style.
STYLED = 1200
FEATURES = (2, 4, 8, 16, 24)
# Of the best held-out agreement: the fewest features that reach it.
ENOUGH = 0.97
FEWEST_CONCEPTS = 5


@dataclass(frozen=True)
class Pool:
    """Drawings with their embeddings and words, row by row.

    Attributes
    ----------
    raw : float32 array, shape (n, d)
        Unnormalised embeddings.
    columns : dict of str to array, length n
        Of the corpus, "style": "plain", "outline" or "line art", and "colour": that of most of its ink, for things.
    """

    raw: Float[NDArray[np.float32], "n d"]
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class Contrast:
    """An attribute as a question to the corpus.

    Attributes
    ----------
    group, name : str
        What it is one value of, and its own name.
    has, lacks : bool array, length n
        Drawings of a pool with and without it.
    shared : str array, length n
        What two drawings must have in common to be compared.
    """

    group: str
    name: str
    has: NDArray[np.bool_]
    lacks: NDArray[np.bool_]
    shared: np.ndarray


def training_pool(corpus: Corpus, embeddings: EmbeddingSet, clip: Path, seed: int = 0) -> Pool:
    """Return the training drawings of concepts without validation drawings, and some of them restyled."""
    columns, known = corpus.columns, embeddings
    held_out = np.unique(columns["concept"][columns["split"] == "validation"])
    index = known.where("fit", "pool")
    index = index[~np.isin(columns["concept"][known.rows[index]], held_out)]
    rows = known.rows[index]
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:STYLED])
    embedder = Embedder(clip)
    parts, styles = [known.images[index] * known.image_norm[index, None]], [np.full(len(rows), "plain")]
    for style, pixels in (("outline", corpus.outlined), ("line art", corpus.lines)):
        where = columns["restyled"][chosen]
        for start in range(0, len(chosen), 256):
            unit, norm = embedder.images(as_images(pixels[where[start : start + 256]]))
            parts.append(unit * norm[:, None])
        styles.append(np.full(len(chosen), style))
    every = np.concatenate([rows, chosen, chosen])
    colour = np.full(len(every), "", "<U6")
    things = np.flatnonzero(np.isin(columns["category"][rows], THINGS))
    for start in range(0, len(things), 256):
        part = things[start : start + 256]
        colour[part] = np.array(list(NAMED))[colour_shares(corpus.plain[rows[part]]).argmax(1)]
    added = {"style": np.concatenate(styles), "colour": colour}
    return Pool(np.concatenate(parts), {name: values[every] for name, values in columns.items()} | added)


def joined(*columns: np.ndarray) -> np.ndarray:
    """Return strings that are equal where all columns are."""
    return np.array(["|".join(parts) for parts in zip(*columns, strict=True)])


def without_words(texts: np.ndarray, words: dict[str, str]) -> np.ndarray:
    """Return texts with some words replaced."""
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    return np.array([pattern.sub(lambda match: words[match[0]], text) for text in texts])


def contrasts(columns: dict[str, np.ndarray]) -> list[Contrast]:
    """Return the contrasts that the corpus's words and metadata support."""
    concept, caption, artist = columns["concept"], columns["caption"], columns["set"]
    tone, gender, style = columns["tone"], columns["gender"], columns["style"]
    plain = style == "plain"
    words = [frozenset(text.split()) for text in caption]
    found = []
    same = joined(concept, artist)
    for value in TONES:
        found.append(
            Contrast("skin tone", f"{value} skin", plain & (tone == value), plain & (tone != value), same)
        )
    person = joined(without_words(concept, GENDERED), artist, tone)
    for value, other in (("woman", "man"), ("man", "woman")):
        found.append(Contrast("gender", value, plain & (gender == value), plain & (gender == other), person))
    # Of one thing that artists colour differently: words of colour are of hearts and squares alone.
    colour = columns["colour"]
    for value in COLOURS:
        found.append(Contrast("colour", value, colour == value, (colour != "") & (colour != value), concept))
    family = np.array(["cat" if "cat" in w else "face" if "face" in w else "" for w in words])
    smiles, frowns = (
        np.array([bool(w & some) for w in words]) & plain & (family != "") for some in (SMILING, FROWNING)
    )
    both = smiles & frowns
    face = joined(family, artist)
    found.append(Contrast("expression", "smile", smiles & ~both, frowns & ~both, face))
    found.append(Contrast("expression", "frown", frowns & ~both, smiles & ~both, face))
    toned = joined(concept, tone)
    for value in np.unique(columns["family"]):
        own = columns["family"] == value
        found.append(Contrast("artist", f"{value} style", plain & own, plain & ~own, toned))
    drawing = joined(artist, columns["name"])
    for value in ("outline", "line art"):
        found.append(Contrast("ink", value, style == value, plain, drawing))
    return found


def differences(
    pool: Pool, contrast: Contrast
) -> tuple[Float[NDArray[np.float64], "concepts d"], np.ndarray, int]:
    """Return the mean difference within each concept, what each shares, and the pairs behind all of them."""
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for i in np.flatnonzero(contrast.has | contrast.lacks):
        sides.setdefault(str(contrast.shared[i]), ([], []))[0 if contrast.has[i] else 1].append(int(i))
    both = {key: pair for key, pair in sides.items() if pair[0] and pair[1]}
    means = [
        pool.raw[a].mean(0, dtype=np.float64) - pool.raw[b].mean(0, dtype=np.float64)
        for a, b in both.values()
    ]
    pairs = sum(min(len(a), len(b)) for a, b in both.values())
    return np.array(means).reshape(len(means), pool.raw.shape[1]), np.array(list(both)), pairs


def pursuit(
    target: Float[NDArray[np.float64], " d"], atoms: Float[NDArray[np.float64], "n d"], count: int
) -> tuple[NDArray[np.int64], Float[NDArray[np.float64], " k"]]:
    """Return the atoms and their weights that orthogonal matching pursuit takes for `target`."""
    lengths = np.linalg.norm(atoms, axis=1).clip(1e-9)
    chosen: list[int] = []
    weights = np.zeros(0)
    left = target
    for _ in range(count):
        score = np.abs(atoms @ left) / lengths
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - weights @ atoms[chosen]
    return np.array(chosen), weights


def fit(
    pool: Pool, contrast: Contrast, whitening: NDArray[np.float32], dictionary: Dictionary
) -> tuple[Attribute, NDArray[np.float64]] | None:
    """Return the sparse direction of a contrast and the dense one, unnormalised; None where concepts are too few."""
    found, shared, pairs = differences(pool, contrast)
    if len(found) < FEWEST_CONCEPTS:
        return None
    white = found @ whitening
    atoms = dictionary.decoder_rows(Modality.IMAGE).detach().double().numpy() @ whitening
    # By a fixed shuffle of what is shared: all values of an attribute leave the same concepts out.
    order = np.argsort(np.random.default_rng(0).permutation(len(white)))
    held_out = order < max(1, len(white) // 5)
    inner, outer = white[~held_out].mean(0), white[held_out].mean(0)
    agreement = []
    for count in FEATURES:
        ids, weights = pursuit(inner, atoms, count)
        made = weights @ atoms[ids]
        agreement.append(float(made @ outer / (np.linalg.norm(made) * np.linalg.norm(outer))))
    count = FEATURES[next(i for i, a in enumerate(agreement) if a >= ENOUGH * max(agreement))]
    ids, weights = pursuit(white.mean(0), atoms, count)
    entry = AttributeEntry(contrast.name, contrast.group, 0.0, pairs, len(np.unique(shared)))
    return Attribute(entry, ids, weights.astype(np.float32)), found.mean(0)


def fit_all(
    pool: Pool, whitening: NDArray[np.float32], dictionary: Dictionary
) -> tuple[list[Attribute], dict[str, NDArray[np.float64]]]:
    """Return every attribute that the pool supports, without its dose, and the dense directions by name."""
    attributes, dense = [], {}
    for contrast in contrasts(pool.columns):
        fitted = fit(pool, contrast, whitening, dictionary)
        if fitted is not None:
            attributes.append(fitted[0])
            dense[contrast.name] = fitted[1]
    return attributes, dense


def eligible(group: str, name: str, columns: dict[str, np.ndarray]) -> Sequence[str]:
    """Return the concepts with validation drawings in which an attribute could be seen, sorted; they lack it.

    Parameters
    ----------
    columns : dict of str to array
        Of the whole corpus.
    """
    held_out = columns["split"] == "validation"
    concept = columns["concept"]
    words = {c: frozenset(c.split()) for c in np.unique(concept[held_out])}
    keep = held_out
    if group == "skin tone":
        keep = held_out & np.isin(concept, concept[columns["tone"] == "dark"])
    elif group == "gender":
        # One person: of two it would not be clear whose gender is meant.
        keep = held_out & np.array([sum(word in GENDERED for word in c.split()) == 1 for c in concept])
        keep &= columns["gender"] == ("man" if name == "woman" else "woman")
    elif group == "colour":
        keep = held_out & np.isin(columns["category"], THINGS)
    elif group == "expression":
        keep = held_out & (columns["category"] == "Smileys & Emotion")
    known = {"colour": frozenset(COLOURS), "expression": SMILING if name == "smile" else FROWNING}
    named = known.get(group, frozenset())
    found = [str(c) for c in np.unique(concept[keep]) if not words[c] & named]
    if group == "expression":
        found = [c for c in found if words[c] & {"face", "cat"}]
    return [c for c in found if not words[c] & {"flag", "keycap", "letter", "button"}]
