"""Which pairs are for what, and the embeddings of those that are used, as the other steps of training take them.

A pair's part hangs on a hash of its group, or of its image's key, unless the pair says its split: 80% train, 10%
validation, 10% test, the same in every run and on every machine. Of the training pairs a share is kept from the
dictionaries (`POOL`). Choices are made on validation; test is reported on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from training.build.errors import BuildError
from training.build.settings import POOL, BuildSettings
from training.build.store import Store
from training.towers.embed import EmbeddingSet

TRAIN, VALIDATION = 0.8, 0.9
# With fewer pairs nothing that is fitted or measured means anything.
MIN_FIT, MIN_HELD_OUT = 64, 16
# What "woman" and "man" are asked with: the direction of gender is the mean over these.
PROMPTS = ("{}", "a {}", "a photo of a {}", "a picture of a {}")
PEOPLE = ("woman", "man")
PEOPLE_FILE = "people.npy"


@dataclass(frozen=True)
class Selection:
    """The pairs that a build works with.

    Attributes
    ----------
    embeddings : EmbeddingSet
        Of these pairs and of their distinct captions, "man" and "woman" among them.
    columns : dict of str to array
        One entry a pair: source, row, key, caption, concept, gender, profession, label, and what the corpus of the
        embedded bundle has besides (set, name, tone, category).
    counts : dict of str to int
        Pairs of the store by part, before any limit.
    """

    embeddings: EmbeddingSet
    columns: dict[str, np.ndarray]
    counts: dict[str, int]

    def where(self, *parts: str) -> np.ndarray:
        """Return the indices of the pairs in any of `parts`."""
        return self.embeddings.where(*parts)


def hashed(names: np.ndarray) -> np.ndarray:
    """Return three numbers in [0, 1) for each name, float64 [n, 3], from its SHA-256."""
    distinct, where = np.unique(names, return_inverse=True)
    digests = b"".join(hashlib.sha256(str(name).encode()).digest()[:24] for name in distinct)
    # 53 bits are all that a double holds.
    numbers = np.frombuffer(digests, ">u8").reshape(-1, 3) >> np.uint64(11)
    return (numbers / 2.0**53)[where]


def group_names(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the name of each pair's group, or of its image: pairs that share it are not independent."""
    return np.where(columns["group"] != "", columns["group"], columns["key"])


def parts_of(names: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair's part and its place in a fixed random order.

    Parameters
    ----------
    names : str array, shape (n,)
        Group, or image's key: pairs that share it share a part.
    split : str array, shape (n,)
        What the pair says of itself; "" where nothing.

    Returns
    -------
    part : str array, shape (n,)
        "fit", "pool", "validation" or "test".
    order : float64 array, shape (n,)
        In [0, 1).
    """
    u, v, order = hashed(names).T
    dealt = np.select([u < TRAIN, u < VALIDATION], ["train", "validation"], "test")
    said = np.where(split == "", dealt, split)
    return np.where(said == "train", np.where(v < POOL, "pool", "fit"), said).astype("<U10"), order


def first_of(part: np.ndarray, order: np.ndarray, limits: dict[str, int]) -> np.ndarray:
    """Return the indices of at most `limits[p]` pairs of each part p, in their own order."""
    chosen = []
    for name, limit in limits.items():
        inside = np.flatnonzero(part == name)
        chosen.append(inside[np.argsort(order[inside], kind="stable")[:limit]])
    return np.sort(np.concatenate(chosen))


def gather(store: Store, rows: np.ndarray, side: str) -> np.ndarray:
    """Read some rows of a store, ascending, as float32: (n, d) of "images", (templates, n, d) of "texts"."""
    parts, start = [], 0
    for shard in store.shards():
        inside = rows[(rows >= start) & (rows < start + shard.rows)] - start
        if len(inside):
            parts.append(store.side(shard, side)[..., inside, :].astype(np.float32))
        start += shard.rows
    return np.concatenate(parts, axis=-2)


def unit(x: np.ndarray) -> np.ndarray:
    """Return rows of length 1; half floats round lengths."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@lru_cache(maxsize=1)
def select(folder: Path, settings: BuildSettings) -> Selection:
    """Choose the pairs of a build from a finished store.

    Raises
    ------
    BuildError
        Where there are too few.
    """
    store = Store.open(folder)
    rows = store.rows()
    column = {name: np.array(rows[name].to_pylist(), dtype=object) for name in rows.column_names}
    part, order = parts_of(group_names(column), column["split"])
    counts = {name: int((part == name).sum()) for name in ("fit", "pool", "validation", "test")}
    held_out = min(counts["validation"], settings.evaluation_limit)
    limits = {
        "fit": settings.fit_limit,
        "pool": max(0, settings.table_limit - held_out),
        "validation": settings.evaluation_limit,
        "test": settings.evaluation_limit,
    }
    chosen = first_of(part, order, limits)
    check_counts(part[chosen])
    column = {name: values[chosen] for name, values in column.items()}
    people = np.load(folder / PEOPLE_FILE, allow_pickle=False)
    embeddings = _embedding_set(store, chosen, part[chosen], column, people)
    repeated = len(np.unique(column["key"])) < len(chosen)
    concept = np.where(column["group"] != "", column["group"], column["key" if repeated else "caption"])
    empty = np.full(len(chosen), "", dtype=object)
    texts = {name: column[name].astype(str) for name in ("gender", "profession", "label")}
    columns = {
        **column, **texts, "concept": concept, "set": column["source"], "name": column["key"],
        "tone": empty, "category": empty,
    }  # fmt: skip
    return Selection(embeddings, columns, counts)


def check_counts(part: np.ndarray) -> None:
    """Raise BuildError where a part has too few pairs."""
    for names, least in ((("fit",), MIN_FIT), (("validation",), MIN_HELD_OUT), (("test",), MIN_HELD_OUT)):
        found = int(np.isin(part, names).sum())
        if found < least:
            raise BuildError(
                f"{found} pairs are for {names[0]}, and {least} are the least: bring more pairs, or a column `split`"
            )


def _embedding_set(
    store: Store, chosen: np.ndarray, part: np.ndarray, column: dict[str, np.ndarray], people: np.ndarray
) -> EmbeddingSet:
    captions, first = np.unique(
        np.concatenate([column["caption"], np.array(PEOPLE, dtype=object)]), return_index=True
    )
    own = first < len(chosen)
    texts = np.empty((len(store.key.templates), len(captions), store.key.embed_dim), np.float32)
    # Captions repeat; each is read where it is first.
    rows = chosen[first[own]]
    by_row = np.argsort(rows)
    texts[:, np.flatnonzero(own)[by_row]] = gather(store, rows[by_row], "texts")
    for who, prompts in zip(PEOPLE, people, strict=True):
        texts[:, np.searchsorted(captions, who)] = unit(prompts.mean(0))
    images = unit(gather(store, chosen, "images"))
    return EmbeddingSet(
        fingerprint=store.key.fingerprint,
        logit_scale=store.key.logit_scale,
        rows=np.arange(len(chosen)),
        images=images,
        image_norm=column["image_norm"].astype(np.float32),
        caption=np.searchsorted(captions, column["caption"]),
        part=part,
        view_images=images[:0],
        view_caption=np.zeros(0, np.int64),
        captions=captions,
        texts=unit(texts),
        # Nothing here takes the norms of texts, and the store does not keep them.
        text_norm=np.full(texts.shape[:2], np.nan, np.float32),
    )
