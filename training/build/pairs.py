"""Image-text pairs as users keep them: a table beside a folder of images, or webdataset shards.

A source counts its rows without reading images, and reads any range of them, so that work can be dealt out and taken
up again. A row that cannot be used is a `BadRow` with the reason; it never stops a build.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow.parquet as pq

from services.strict_json import canonical_json
from training.build.errors import BuildError

TABLES = (".csv", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
# What a shard says of an image.
TEXTS = (".txt", ".caption", ".json")
# Names that data sets in the wild give the same thing; the first is ours.
PATH_NAMES = ("path", "image", "file", "filepath", "file_name", "filename")
CAPTION_NAMES = ("caption", "text", "title")
LABELS = ("gender", "profession", "label", "group", "split")
GENDERS = {
    "woman": "woman", "female": "woman", "f": "woman", "man": "man", "male": "man", "m": "man",
    "": "", "unknown": "", "none": "", "na": "",
}  # fmt: skip
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test", "": "",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One image with one caption.

    Attributes
    ----------
    row : int
        Its place in the source.
    key : str
        Names the image: its path in the table, or its key in a shard.
    image : bytes
        Encoded.
    caption : str
        Not empty.
    gender : str
        "woman", "man" or "".
    profession, label, group, split : str
        "" where the row has none; `split` is "train", "validation" or "test".
    """

    row: int
    key: str
    image: bytes
    caption: str
    gender: str = ""
    profession: str = ""
    label: str = ""
    group: str = ""
    split: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that is skipped, and why."""

    row: int
    key: str
    reason: str


class Source(Protocol):
    """Where pairs come from.

    Attributes
    ----------
    name : str
        Of the file, for people.
    """

    name: str

    def __len__(self) -> int:
        """Return the number of rows, bad ones included."""

    def key(self, row: int) -> str:
        """Return what names the image of a row, as `Pair.key`."""

    def digest(self, start: int, stop: int) -> str:
        """Return a hash over what the rows say and how large their images are; no image is read."""

    def read(self, start: int, stop: int) -> Iterator[Pair | BadRow]:
        """Read rows in order."""


class _Unusable(Exception):
    """Why a row is a bad one."""


def checked_labels(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of a row in our own words."""
    labels = {name: _text(fields.get(name)) for name in LABELS}
    for name, known in (("gender", GENDERS), ("split", SPLITS)):
        value = labels[name].lower()
        if value not in known:
            raise _Unusable(f"{name} {labels[name]!r} is none of {', '.join(sorted(set(known) - {''}))}")
        labels[name] = known[value]
    return labels


def _text(value: Any) -> str:
    # A missing number in a parquet column of texts is NaN, which differs from itself.
    return "" if value is None or value != value else str(value).strip()


class Table:
    """A CSV or parquet file whose rows name images below the file's own folder.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._folder = path.parent.resolve()
        self._rows = _read_table(path)
        columns = self._rows[0] if self._rows else {}
        self._path_column = _column(path, columns, PATH_NAMES)
        self._caption_column = _column(path, columns, CAPTION_NAMES)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        """See `Source`."""
        return _text(self._rows[row].get(self._path_column))

    def _file(self, row: int) -> tuple[str, Path]:
        key = self.key(row)
        file = (self._folder / key).resolve()
        if not key or not file.is_relative_to(self._folder):
            raise _Unusable("the path is empty or leads out of the table's folder")
        return key, file

    def digest(self, start: int, stop: int) -> str:
        """See `Source`."""
        digest = hashlib.sha256()
        for row in range(start, stop):
            try:
                size = self._file(row)[1].stat().st_size
            except (_Unusable, OSError, ValueError):
                size = -1
            said = {name: _text(value) for name, value in self._rows[row].items() if name is not None}
            digest.update(canonical_json([said, size]))
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Pair | BadRow]:
        """See `Source`."""
        for row in range(start, stop):
            fields, key = self._rows[row], self.key(row)
            try:
                labels = checked_labels(fields)
                caption = _text(fields.get(self._caption_column))
                if not caption:
                    raise _Unusable("no caption")
                yield Pair(row, key, self._file(row)[1].read_bytes(), caption, **labels)
            except _Unusable as error:
                yield BadRow(row, key, str(error))
            except (OSError, ValueError) as error:
                yield BadRow(row, key, f"cannot be read: {getattr(error, 'strerror', None) or error}")


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise BuildError(f"{path} cannot be read as a table: {error}") from error


def _column(path: Path, columns: Mapping[str, Any], names: Sequence[str]) -> str:
    found = [name for name in names if name in columns]
    if columns and not found:
        raise BuildError(f"{path} has no column {names[0]!r} (or {', '.join(names[1:])})")
    return found[0] if found else names[0]


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


class Shard:
    """One webdataset shard: an uncompressed tar whose members `<key>.<extension>` belong together by key.

    An image (png, jpg, jpeg, webp), its caption (txt, caption, or a field of json), and labels as fields of json.

    Parameters
    ----------
    path : Path
        The tar.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._samples = _index(path)

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, row: int) -> str:
        """See `Source`."""
        return self._samples[row][0]

    def digest(self, start: int, stop: int) -> str:
        """See `Source`."""
        samples = self._samples[start:stop]
        listed = [
            [key, {suffix: [m.offset, m.size] for suffix, m in members.items()}] for key, members in samples
        ]
        digest = hashlib.sha256(canonical_json([self._path.stat().st_size, listed]))
        # Places and sizes stay where a caption is replaced by one as long.
        with self._path.open("rb") as file:
            for _, members in samples:
                for suffix in TEXTS:
                    if suffix in members:
                        digest.update(_content(file, members[suffix]))
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Pair | BadRow]:
        """See `Source`."""
        with self._path.open("rb") as file:
            for row in range(start, stop):
                key, members = self._samples[row]
                try:
                    yield _sample(
                        row, key, {name: _content(file, member) for name, member in members.items()}
                    )
                except _Unusable as error:
                    yield BadRow(row, key, str(error))


def _content(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _sample(row: int, key: str, parts: Mapping[str, bytes]) -> Pair:
    images = [parts[suffix] for suffix in IMAGES if suffix in parts]
    if not images:
        raise _Unusable(f"no image ({', '.join(suffix[1:] for suffix in IMAGES)})")
    try:
        fields = json.loads(parts[".json"]) if ".json" in parts else {}
        caption = next((parts[s].decode() for s in (".txt", ".caption") if s in parts), "")
    except ValueError as error:
        raise _Unusable(f"its text or json cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise _Unusable("its json is not an object")
    caption = _text(caption) or next((_text(fields[n]) for n in CAPTION_NAMES if n in fields), "")
    if not caption:
        raise _Unusable("no caption")
    return Pair(row, key, images[0], caption, **checked_labels(fields))


def _index(path: Path) -> list[tuple[str, dict[str, _Member]]]:
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if member.isfile() and dot and stem:
                    key = f"{folder}/{stem}" if folder else stem
                    place = _Member(member.offset_data, member.size)
                    samples.setdefault(key, {}).setdefault(f".{suffix.lower()}", place)
    except (OSError, tarfile.TarError) as error:
        raise BuildError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    return list(samples.items())


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Open tables and shards.

    Parameters
    ----------
    paths : sequence of Path
        Tables, tars, and folders of either; a folder's files are taken by name.

    Raises
    ------
    BuildError
        Where there is nothing to read, or two files share a name.
    """
    sources: list[Source] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file())
        chosen = [file for file in found if file.suffix in (*TABLES, ".tar")]
        if not chosen:
            raise BuildError(f"{path}: no .csv, .parquet or .tar to read pairs from")
        sources += [Shard(file) if file.suffix == ".tar" else Table(file) for file in chosen]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BuildError(f"two files of pairs are called {', '.join(twice)}: rename one")
    return sources
