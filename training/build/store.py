"""Embeddings of pairs on disk: shards of .npy that are memory-mapped, beside a manifest that says whose they are.

A shard is finished when its JSON is there, which is written last; whatever else a killed run left is overwritten or
deleted. The folder's name holds the key: the towers with their preprocessing, the wordings of captions, and how they
were computed. Embeddings of other towers never mix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from services.strict_json import canonical_json
from training.build.errors import BuildError

MANIFEST = "manifest.json"
VERSION = 1
ROWS_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("gender", pa.string()),
        ("profession", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("image_norm", pa.float32()),
    ]
)


@dataclass(frozen=True)
class StoreKey:
    """What embeddings depend on, but for the pairs.

    Attributes
    ----------
    fingerprint : str
        Of the towers, preprocessing included.
    templates : tuple of str
        Wordings of each caption.
    dtype : str
        "float16" or "float32": how embeddings are stored.
    backend, device, precision : str
        What computed them: another device rounds otherwise.
    embed_dim : int
        d.
    logit_scale : float
        Of the towers.
    """

    fingerprint: str
    templates: tuple[str, ...]
    dtype: str
    backend: str
    device: str
    precision: str
    embed_dim: int
    logit_scale: float

    def digest(self) -> str:
        """Return 16 hex digits that stand for the key."""
        return hashlib.sha256(canonical_json([VERSION, asdict(self)])).hexdigest()[:16]


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes
    ----------
    name : str
        File stem.
    digest : str
        Of the rows that it was made from: rows that changed are embedded again.
    rows : int
        Pairs in it.
    bad : list of [source, row, key, reason]
        Rows that were skipped.
    """

    name: str
    digest: str
    rows: int
    bad: list[list[Any]]


class Store:
    """A folder of embeddings.

    Parameters
    ----------
    folder : Path
        Made if absent.
    key : StoreKey
        Whose embeddings.
    """

    def __init__(self, folder: Path, key: StoreKey) -> None:
        self.folder, self.key = folder, key

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a finished store.

        Raises
        ------
        BuildError
            Where it is not one, or was not finished.
        """
        try:
            document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            key = {**document["key"], "templates": tuple(document["key"]["templates"])}
            store = cls(folder, StoreKey(**key))
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']}")
            for name in document["shards"]:
                store.entry(name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BuildError(f"{folder} holds no finished embeddings: {error}") from error
        return store

    def entry(self, name: str) -> ShardEntry:
        """Return a finished shard's entry; raises OSError where it is not finished."""
        return ShardEntry(**json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8")))

    def has(self, name: str, digest: str) -> bool:
        """Return whether a shard is finished and was made from the same rows."""
        try:
            return self.entry(name).digest == digest
        except (OSError, ValueError, TypeError):
            return False

    def write(
        self,
        entry: ShardEntry,
        images: Float[np.ndarray, "rows d"],
        texts: Float[np.ndarray, "templates rows d"],
        rows: Mapping[str, Sequence[Any]],
    ) -> None:
        """Write a shard, its JSON last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = np.dtype(self.key.dtype)
        for side, e in (("images", images), ("texts", texts)):
            with _replacing(self.folder / f"{entry.name}.{side}.npy") as part:
                np.save(part, e.astype(dtype), allow_pickle=False)
        with _replacing(self.folder / f"{entry.name}.rows.parquet") as part:
            pq.write_table(pa.table(dict(rows), schema=ROWS_SCHEMA), part, compression="zstd")
        with _replacing(self.folder / f"{entry.name}.json") as part:
            part.write(json.dumps(asdict(entry), ensure_ascii=False).encode())

    def finish(self, names: Sequence[str]) -> None:
        """Write the manifest, the shards in order, when nobody writes any more."""
        for part in self.folder.glob("*.part"):
            # Of runs that were killed: it bears their process's number, so that nobody would overwrite it.
            part.unlink(missing_ok=True)
        document = {"version": VERSION, "key": asdict(self.key), "shards": list(names)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with _replacing(self.folder / MANIFEST) as part:
            part.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())

    def shards(self) -> list[ShardEntry]:
        """Return the entries of all shards of the manifest, in order."""
        document = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return [self.entry(name) for name in document["shards"]]

    def rows(self) -> pa.Table:
        """Return the rows of all shards, in order."""
        tables = [pq.read_table(self.folder / f"{e.name}.rows.parquet") for e in self.shards()]
        return pa.concat_tables([ROWS_SCHEMA.empty_table(), *tables])

    def side(self, shard: ShardEntry, side: str) -> np.ndarray:
        """Return a shard's "images", (rows, d), or "texts", (templates, rows, d), memory-mapped."""
        mapped: np.ndarray = np.load(
            self.folder / f"{shard.name}.{side}.npy", mmap_mode="r", allow_pickle=False
        )
        return mapped

    def digest(self) -> str:
        """Return a hash over the key and what every shard was made from."""
        parts = [[e.name, e.digest, e.rows] for e in self.shards()]
        return hashlib.sha256(canonical_json([asdict(self.key), parts])).hexdigest()


class _replacing:  # noqa: N801  (used like a function)
    """Opens a file beside its place, and puts it there when all was written and is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Any:
        self._file = self._part.open("wb")
        return self._file

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)
