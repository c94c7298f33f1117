"""Tables whose rows name images below their own folder, or hold them: CSV, TSV, JSON lines, parquet and Arrow."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from monofacet._tables import COLUMNS, TableError, find_columns, missing_column, picture_folder, read_csv

from services.strict_json import canonical_json
from training.build.errors import BuildError
from training.build.pairs import (
    ImageTextPair,
    Source,
    Unusable,
    captions,
    checked_labels,
    meant,
    scalar,
)

TEXT_TABLES = (".csv", ".tsv", ".jsonl")
COLUMN_TABLES = (".parquet", ".arrow")
# Names of columns that hold encoded images; img2dataset calls them by their format.
IMAGE_BYTES = (*COLUMNS["image"], "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
# Rows whose paths tell in which folder they begin.
TRIED = 20


class _Rows(Source):
    """Rows that say their captions and labels, and where their image is: what `Table` and `Columns` share."""

    @abstractmethod
    def _check(self, row: int) -> tuple[list[str], dict[str, str]]:
        """Return the captions and the labels of a row."""

    @abstractmethod
    def _bytes(self, row: int) -> bytes:
        """Return the image of a row, or raise `Unusable`."""

    def _pairs(self, row: int) -> list[ImageTextPair]:
        found, labels = self._check(row)
        data = self._bytes(row)
        return [ImageTextPair(row, self.key(row), data, caption, **labels) for caption in found]


class Table(_Rows):
    """A CSV, a TSV or JSON lines.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        For people; the file's own where it is empty.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        super().__init__(name or path.name)
        try:
            self._rows = _lines(path) if path.suffix.lower() == ".jsonl" else _cells(path)
        except TableError as error:
            raise BuildError(str(error)) from error
        named = (scalar(cells.get("image"), "the path") for _, cells, problem in self._rows if not problem)
        self._files = _Files(path.parent, [name for name, _ in zip(named, range(TRIED), strict=False)])

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        """See `Source`."""
        line, cells, problem = self._rows[row]
        return f"(line {line})" if problem else scalar(cells.get("image"), "the path")

    def digest(self, start: int, stop: int) -> str:
        """See `Source`."""
        digest = hashlib.sha256()
        for _, cells, problem in self._rows[start:stop]:
            size = -1 if problem else self._files.size(cells.get("image"))
            digest.update(canonical_json([dict(cells), problem, size]))
        return digest.hexdigest()

    def _check(self, row: int) -> tuple[list[str], dict[str, str]]:
        _, cells, problem = self._rows[row]
        if problem:
            raise Unusable(problem)
        return captions(cells.get("text")), checked_labels(cells)

    def _bytes(self, row: int) -> bytes:
        return self._files.read(self.key(row))


Cells = tuple[int, Mapping[str, Any], str]


def _cells(path: Path) -> list[Cells]:
    table = read_csv(path)
    table.need("image", "text")
    return [(row.line, row.cells, row.problem) for row in table.rows]


def _need(name: str, columns: Iterable[str], header: Sequence[str]) -> None:
    for meaning in ("image", "text"):
        if meaning not in columns:
            raise missing_column(name, header, meaning)


def _lines(path: Path) -> list[Cells]:
    rows: list[Cells] = []
    fields: set[str] = set()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read {path}: {error}") from error
    # JSON has no line ends of its own but these.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                raise Unusable("its json is not an object")
            fields.update(map(str, document))
            cells = meant(document)
            scalar(cells.get("image"), "the path")
            rows.append((number, cells, ""))
        except (ValueError, RecursionError) as error:
            rows.append((number, {}, f"its json cannot be read: {error}"))
        except Unusable as error:
            rows.append((number, {}, str(error)))
    _need(str(path), {meaning for _, cells, _ in rows for meaning in cells}, sorted(fields))
    return rows


class _Files:
    """The images that a table names.

    Parameters
    ----------
    folder : Path
        The table's own.
    named : sequence of str
        Paths in the table, for `picture_folder`.
    """

    def __init__(self, folder: Path, named: Sequence[str]) -> None:
        self._root = folder.resolve()
        self._base = picture_folder(self._root, named)

    def _path(self, name: Any) -> Path:
        key = scalar(name, "the path")
        if not key:
            raise Unusable("the path is empty or leads out of the table's folder")
        plain = self._base / key
        if ".." in plain.parts or not plain.is_relative_to(self._root):
            raise Unusable("the path is empty or leads out of the table's folder")
        path = plain.resolve()
        if not path.is_relative_to(self._root):
            raise Unusable("the path leads out of the table's folder by a link, which is not followed")
        return path

    def size(self, name: Any) -> int:
        """Return the bytes of an image, -1 where there is none."""
        try:
            return self._path(name).stat().st_size
        except (Unusable, OSError, ValueError):
            return -1

    def read(self, name: Any) -> bytes:
        """Return an image."""
        try:
            return self._path(name).read_bytes()
        except (OSError, ValueError) as error:
            raise Unusable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


class Columns(_Rows):
    """A parquet or Arrow file, as Hugging Face `datasets`, img2dataset and pandas write them.

    Its images are named, or they are in the file, as bytes or as `{bytes, path}`. Those are read a group of rows at a
    time, when they are asked for.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        For people; the file's own where it is empty.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        super().__init__(name or path.name)
        self._path = path
        try:
            schema = _schema(path)
            embedded = [f.name for f in schema if _holds_images(f)]
            plain = [f.name for f in schema if f.name not in embedded]
            if len(embedded) > 1:
                raise TableError(f"{path}: the columns {' and '.join(embedded)} both hold images: rename one")
            wanted = tuple(meaning for meaning in COLUMNS if not (embedded and meaning == "image"))
            named = find_columns(str(path), plain, wanted)
            columns = {**named, **({"image": embedded[0]} if embedded else {})}
            _need(str(path), columns, schema.names)
            status = [name for name in plain if embedded and name == "status"]
            # Of embedded images their names alone.
            light = _read(path, [*named.values(), *status])
            self._image = embedded[0] if embedded else None
            self._cells = {meaning: light.column(column).to_pylist() for meaning, column in named.items()}
            self._keys = self._embedded_keys(schema) if self._image else []
            # img2dataset writes a row for what it could not download, too, and says so.
            said = light.column("status").to_pylist() if status else []
            self._places = [i for i in range(light.num_rows) if not said or said[i] in (None, "success")]
        except TableError as error:
            raise BuildError(str(error)) from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise BuildError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
        self._files = _Files(
            path.parent, [] if self._image else [self.key(i) for i in range(min(len(self), TRIED))]
        )

    def _embedded_keys(self, schema: pa.Schema) -> list[str]:
        field = schema.field(self._image)
        names: list[str | None] = []
        if pa.types.is_struct(field.type) and "path" in [f.name for f in field.type]:
            names = _read_paths(self._path, field.name)
        rows = names or [None] * _count(self._path)
        return [str(name) if name else f"row {i}" for i, name in enumerate(rows)]

    def __len__(self) -> int:
        return len(self._places)

    def key(self, row: int) -> str:
        """See `Source`."""
        place = self._places[row]
        if self._image:
            return self._keys[place]
        value = self._cells["image"][place]
        return value.strip() if isinstance(value, str) else ""

    def _check(self, row: int) -> tuple[list[str], dict[str, str]]:
        fields = self._fields(row)
        return captions(fields.get("text")), checked_labels(fields)

    def _fields(self, row: int) -> dict[str, Any]:
        place = self._places[row]
        return {meaning: values[place] for meaning, values in self._cells.items()}

    def digest(self, start: int, stop: int) -> str:
        """See `Source`."""
        # The file's size stands for images that are in it, as in a shard.
        digest = hashlib.sha256(str(self._path.stat().st_size if self._image else 0).encode())
        for row in range(start, stop):
            size = 0 if self._image else self._files.size(self.key(row))
            digest.update(repr([sorted(self._fields(row).items()), self.key(row), size]).encode())
        return digest.hexdigest()

    def _bytes(self, row: int) -> bytes:
        if not self._image:
            return self._files.read(self.key(row))
        try:
            value = _image(self._path, self._image, self._places[row])
        except (OSError, pa.ArrowException) as error:
            raise Unusable(f"cannot be read: {str(error).splitlines()[0]}") from error
        if isinstance(value, dict):
            data = value.get("bytes")
            if data is None and value.get("path"):
                return self._files.read(value["path"])
        else:
            data = value
        if not data:
            raise Unusable("no image")
        return bytes(data)


def _holds_images(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_struct(kind):
        return field.name.lower() in IMAGE_BYTES and "bytes" in [f.name for f in kind]
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return binary and field.name.lower() in IMAGE_BYTES


def _schema(path: Path) -> pa.Schema:
    return pq.read_schema(path) if path.suffix.lower() == ".parquet" else _arrow(path).schema


def _count(path: Path) -> int:
    return pq.read_metadata(path).num_rows if path.suffix.lower() == ".parquet" else _arrow(path).num_rows


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    if path.suffix.lower() != ".parquet":
        return _arrow(path).select(list(columns))
    if not columns:
        # Arrow would forget how many rows there are.
        return pa.table({"": pa.nulls(_count(path))})
    return pq.ParquetFile(path).read(columns=list(columns))


def _read_paths(path: Path, image: str) -> list[str | None]:
    if path.suffix.lower() == ".parquet":
        column = pq.ParquetFile(path).read(columns=[f"{image}.path"]).column(image)
    else:
        column = _arrow(path).column(image)
    return [name for chunk in column.chunks for name in chunk.field("path").to_pylist()]


def _arrow(path: Path) -> pa.Table:
    """Map an Arrow file into memory: a stream, as `datasets` writes it, or a file with a footer."""
    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


def _image(path: Path, column: str, row: int) -> Any:
    if path.suffix.lower() != ".parquet":
        return _arrow_column(path, column)[row].as_py()
    metadata = _metadata(path)
    start = 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if row < stop:
            return _group(path, column, group)[row - start].as_py()
        start = stop
    raise IndexError(row)


# One group of rows at a time is in memory: images are asked for in order.
@lru_cache(maxsize=1)
def _group(path: Path, column: str, group: int) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


@lru_cache(maxsize=8)
def _metadata(path: Path) -> pq.FileMetaData:
    return pq.read_metadata(path)


@lru_cache(maxsize=8)
def _arrow_column(path: Path, column: str) -> pa.ChunkedArray:
    return _arrow(path).column(column)
