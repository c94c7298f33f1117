"""Embed pairs into a store, shard by shard; a shard that is there is not made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from services.encoding.clip import build_clip, read_clip_config, read_logit_scale, tower_fingerprint
from services.encoding.images import ImagePreprocess, decode_image
from services.encoding.texts import Tokeniser
from services.encoding.torch_backend import TorchTowers
from services.errors import ImageError
from training.build.pairs import BadRow, Pair, Source, bad_row
from training.build.sources import open_sources
from training.build.store import ShardEntry, Store, StoreKey
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

# The towers' largest piece: more at once is not faster on a CPU.
BATCH = 32


@dataclass(frozen=True)
class Task:
    """One shard to make: rows `start` to `stop` of a source."""

    name: str
    source: int
    start: int
    stop: int


class Embedder:
    """The towers of a build.

    Parameters
    ----------
    clip : Path
        Folder of config and weights.
    device : str
        "cpu" or "cuda".
    """

    def __init__(self, clip: Path, device: str = "cpu") -> None:
        self.config = read_clip_config(clip / CONFIG_FILE)
        model = build_clip(self.config, clip / WEIGHTS_FILE)
        self.towers = TorchTowers(model, self.config, device=device)
        self.preprocess = ImagePreprocess(self.config)
        self._tokeniser = Tokeniser(self.config)

    def images(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return unit embeddings, (n, d), and norms, (n,), of preprocessed images."""
        empty = np.zeros((0, self.config.embed_dim), np.float32), np.zeros(0, np.float32)
        found = [
            self.towers.encode_images(np.stack(images[i : i + BATCH])) for i in range(0, len(images), BATCH)
        ]
        return (
            np.concatenate([empty[0], *(f.unit for f in found)]),
            np.concatenate([empty[1], *(f.norm for f in found)]),
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit embeddings, (n, d); texts that are too long are cut."""
        if not texts:
            return np.zeros((0, self.config.embed_dim), np.float32)
        return self.towers.encode_texts(self._tokeniser.tokenise(texts, truncate=True)).unit

    def wordings(self, captions: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return unit embeddings of captions in every template, (templates, n, d)."""
        distinct, where = np.unique(np.array(captions, dtype=object), return_inverse=True)
        units = [self.texts([template.replace("{}", c) for c in distinct]) for template in templates]
        return np.stack(units)[:, where]


@cache
def embedder(clip: Path, device: str) -> Embedder:
    """Return the towers of a folder, loaded once a process."""
    return Embedder(clip, device)


@cache
def sources(paths: tuple[Path, ...]) -> list[Source]:
    """Return the sources, indexed once a process."""
    return open_sources(paths)


def store_key(clip: Path, templates: tuple[str, ...], dtype: str, device: str) -> StoreKey:
    """Return the key of a store for these towers."""
    return StoreKey(
        fingerprint=tower_fingerprint(clip / CONFIG_FILE, clip / WEIGHTS_FILE),
        templates=templates,
        dtype=dtype,
        backend="torch",
        device=device,
        precision="f32",
        embed_dim=read_clip_config(clip / CONFIG_FILE).embed_dim,
        logit_scale=read_logit_scale(clip / WEIGHTS_FILE),
    )


def plan(opened: Sequence[Source], shard_rows: int) -> list[Task]:
    """Deal the rows of all sources into shards; bad rows count, so that a shard's place never depends on them."""
    return [
        Task(f"{number:03d}-{start // shard_rows:06d}", number, start, min(start + shard_rows, len(source)))
        for number, source in enumerate(opened)
        for start in range(0, len(source), shard_rows)
    ]


def make_shard(paths: tuple[Path, ...], clip: Path, store: Store, task: Task) -> ShardEntry:
    """Embed the rows of one shard and write it; the unit of work of a process."""
    source = sources(paths)[task.source]
    towers = embedder(clip, store.key.device)
    # Before the rows are read: what changes meanwhile is made again.
    digest = source.digest(task.start, task.stop)
    kept: list[Pair] = []
    bad: list[BadRow] = []
    units: list[np.ndarray] = []
    norms: list[np.ndarray] = []
    pixels: list[np.ndarray] = []

    def run() -> None:
        unit, norm = towers.images(pixels)
        units.append(unit)
        norms.append(norm)
        pixels.clear()

    for item in source.read(task.start, task.stop):
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        try:
            pixels.append(towers.preprocess(decode_image(item.image)))
        except ImageError as error:
            bad.append(bad_row(item.row, item.key, str(error)))
            continue
        # Without its bytes: a shard's images together may not fit in memory.
        kept.append(replace(item, image=b""))
        if len(pixels) == BATCH:
            run()
    run()
    entry = ShardEntry(
        task.name, digest, len(kept), [[source.name, row.row, row.key, row.reason] for row in bad]
    )
    texts = towers.wordings([pair.caption for pair in kept], store.key.templates)
    store.write(entry, np.concatenate(units), texts, _columns(source.name, kept, np.concatenate(norms)))
    return entry


def _columns(source: str, pairs: Sequence[Pair], norms: np.ndarray) -> dict[str, list]:
    columns: dict[str, list] = {"source": [source] * len(pairs)}
    for name in ("row", "key", "caption", "gender", "profession", "label", "group", "split"):
        columns[name] = [getattr(pair, name) for pair in pairs]
    return {**columns, "image_norm": norms.tolist()}


def missing(store: Store, opened: Sequence[Source], tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks whose shard is not there, or was made from other rows."""
    return [t for t in tasks if not store.has(t.name, opened[t.source].digest(t.start, t.stop))]


def fitting(paths: tuple[Path, ...], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """Return which rows of a store are still where they were embedded from, bool [n].

    Parameters
    ----------
    paths : tuple of Path
        The sources.
    columns : mapping of str to sequence
        "source", "row" and "key" of the store's rows. The key is what tells: a table that was sorted anew has other
        images in its rows.
    """
    by_name = {source.name: source for source in sources(paths)}

    def fits(name: str, row: int, key: str) -> bool:
        source = by_name.get(name)
        return source is not None and row < len(source) and source.key(row) == key

    places = zip(columns["source"], columns["row"], columns["key"], strict=True)
    return np.array([fits(*place) for place in places], bool)


def read_images(paths: tuple[Path, ...], wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
    """Read encoded images again, by source name and row; those that cannot be read any more are left out.

    Whether a row is still the same one `fitting` says.
    """
    by_name = {source.name: source for source in sources(paths)}
    found = {}
    # In order: images that a table holds are read by groups of rows.
    for name, row in sorted(set(wanted)):
        source = by_name.get(name)
        if source is None or row >= len(source):
            continue
        for item in source.read(row, row + 1):
            if isinstance(item, Pair):
                found[name, row] = item.image
    return found
