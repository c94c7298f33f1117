"""Tables of inputs as people have them: the one reader, with the one list of names that the same thing goes by.

It knows neither grpc nor the server. ``monofacet gender audit --csv``, ``monofacet modality --pairs`` and
``monofacet bundle build --pairs`` read by it.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What a column is for, and the names that it goes by in public data sets; the first is ours. Case does not matter,
# nor do blanks and dashes instead of underscores.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": (
        "image", "path", "file", "filepath", "file_path", "filename", "file_name", "image_path", "image_file",
        "image_name", "img", "img_path",
    ),
    "text": ("text", "caption", "captions", "title", "sentence", "sentences", "comment"),
    "gender": ("gender", "sex"),
    "profession": ("profession", "occupation", "job"),
    "label": ("label",),
    "group": ("group", "cluster"),
    "split": ("split",),
}  # fmt: skip
# Pictures that are looked for, to find the folder that paths begin in.
_TRIED = 20
# Words for none: an empty cell says the same.
NONE = ("unknown", "none", "nan", "na", "n/a", "null", "-")
GENDERS = {"woman": ("woman", "female", "f"), "man": ("man", "male", "m"), "": NONE}
SPLITS = {
    "train": ("train", "training", "restval"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "": NONE,
}


class TableError(ValueError):
    """A table that cannot be read as one; the message names it and says why, in one line."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes
    ----------
    line : int
        Where it begins in the file, from 1.
    cells : mapping of str to str
        By what a column is for, as in `COLUMNS`; without the blanks around them. Those that the table or the row
        lacks are absent.
    problem : str
        Why the row cannot be taken; empty where it can.
    """

    line: int
    cells: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes
    ----------
    name : str
        For errors.
    header : tuple of str
        Its columns as they are written.
    columns : mapping of str to str
        As `find_columns`.
    rows : tuple of Row
        In order.
    """

    name: str
    header: tuple[str, ...]
    columns: Mapping[str, str]
    rows: tuple[Row, ...]

    def need(self, *meanings: str) -> None:
        """Raise TableError where the table lacks one of the columns."""
        for meaning in meanings:
            if meaning not in self.columns:
                raise missing_column(self.name, self.header, meaning)


def synonyms(meaning: str) -> str:
    """Return a column's name with the others that it goes by, for help."""
    first, *others = COLUMNS[meaning]
    return f"{first} (or {', '.join(others)})" if others else first


def help_text(*meanings: str) -> str:
    """Return what the columns of a table may be called, and the words for genders, for help."""
    said = "; ".join(synonyms(meaning) for meaning in meanings)
    if "gender" in meanings:
        known = ", ".join(f"{word} ({', '.join(words[1:])})" for word, words in GENDERS.items() if word)
        said += f". Genders: {known}; none is empty or {', '.join(NONE)}"
    return f"{said}. Case does not matter"


def find_columns(name: str, header: Sequence[str], wanted: Sequence[str] = tuple(COLUMNS)) -> dict[str, str]:
    """Find out what the columns of a table are for.

    Parameters
    ----------
    name : str
        Of the table, for errors.
    header : sequence of str
        Its columns' names.
    wanted : sequence of str
        Which columns, of `COLUMNS`.

    Returns
    -------
    dict of str to str
        From what a column is for to its name in the table; those that it lacks are absent.

    Raises
    ------
    TableError
        Where two columns stand for the same thing.
    """
    found = {}
    for meaning in wanted:
        named = [column for column in header if _plain(column) in COLUMNS[meaning]]
        if len(named) > 1:
            raise TableError(
                f"{name}: the columns {' and '.join(named)} both stand for {meaning}: rename one"
            )
        if named:
            found[meaning] = named[0]
    return found


def _plain(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def missing_column(name: str, header: Sequence[str], meaning: str) -> TableError:
    """Return the error of a table without a column that it must have."""
    if len(header) == 1 and (mark := next((m for m in (";", "\t", "|") if m in header[0]), None)):
        return TableError(
            f"{name} has one column, {header[0]!r}: its cells are separated by {mark!r}, not by commas"
        )
    return TableError(f"{name} has no column {synonyms(meaning)}; it has {', '.join(header)[:200] or 'none'}")


def gender_of(text: str) -> str:
    """Return "woman", "man" or "" for any word of `GENDERS`; TableError for another."""
    return _word(text, GENDERS, "gender")


def split_of(text: str) -> str:
    """Return "train", "validation", "test" or "" for any word of `SPLITS`; TableError for another."""
    return _word(text, SPLITS, "split")


def _word(text: str, known: Mapping[str, Sequence[str]], what: str) -> str:
    word = text.strip().lower()
    if not word:
        return ""
    for ours, words in known.items():
        if word in words:
            return ours
    every = ", ".join(word for words in known.values() for word in words)
    raise TableError(f"{what} {text.strip()[:60]!r} is none of {every}")


def texts_of(cell: str) -> list[str]:
    """Return the texts of a cell: several where it holds a list, as JSON or as Python prints it, else the cell."""
    if cell.startswith("[") and cell.endswith("]"):
        readers: tuple[Callable[[str], object], ...] = (json.loads, ast.literal_eval)
        for read in readers:
            try:
                value = read(cell)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
                return [text.strip() for text in value if text.strip()]
    return [cell] if cell else []


def picture_folder(folder: Path, named: Sequence[str]) -> Path:
    """Return the folder that the paths in a table begin in.

    That is the table's own; but where none of them is there, and one is in a folder in it, it is that folder: many data
    sets have a table beside a folder of pictures, and name the pictures alone.

    Parameters
    ----------
    folder : Path
        The table's.
    named : sequence of str
        Paths in the table; the first `_TRIED` are looked for.
    """
    tried = [name for name in named if name][:_TRIED]
    if not tried or _holds(folder, tried):
        return folder
    inner = sorted(found for found in folder.iterdir() if found.is_dir() and not found.name.startswith("."))
    return next((found for found in inner if _holds(found, tried)), folder)


def _holds(folder: Path, named: Sequence[str]) -> bool:
    def is_file(name: str) -> bool:
        try:
            return (folder / name).is_file()
        except (OSError, ValueError):
            return False

    return any(map(is_file, named))


def read_csv(path: Path, wanted: Sequence[str] = tuple(COLUMNS)) -> Table:
    """Read a CSV with a header; or, where its name ends with .tsv, one with tabs.

    A cell that is not what somebody wrote is a row with a `problem` and never silence: a comma that is not quoted, a
    quote that is not closed. Rows without anything in them are passed over.

    Parameters
    ----------
    path : Path
        The file, UTF-8.
    wanted : sequence of str
        Which columns, of `COLUMNS`.

    Raises
    ------
    TableError
        Where the file cannot be read, has no header, or has two columns for the same thing.
    """
    lines = _Lines(_text(path))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    records = _records(lines, delimiter)
    header: list[str] = []
    for _, found in records:
        if isinstance(found, str):
            raise TableError(f"{path}: its header cannot be read: {found}")
        if any(cell.strip() for cell in found):
            header = found
            break
    if not header:
        raise TableError(f"{path} is empty")
    columns = find_columns(str(path), header, wanted)
    places = {meaning: header.index(name) for meaning, name in columns.items()}
    rows = []
    for line, found in records:
        if isinstance(found, str):
            rows.append(Row(line, problem=found))
        elif any(cell.strip() for cell in found):
            cells = {meaning: found[i].strip() for meaning, i in places.items() if i < len(found)}
            # Cells behind the last column that hold nothing are commas that a program left.
            extra = any(cell.strip() for cell in found[len(header) :])
            rows.append(Row(line, cells, _surplus(len(found), len(header)) if extra else ""))
    return Table(str(path), tuple(header), columns, tuple(rows))


def _surplus(cells: int, columns: int) -> str:
    return f"{cells} cells for {columns} columns: a text with a comma must stand in quotes"


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TableError(f"cannot read {path}: it is UTF-16; save it as UTF-8")
    try:
        # Excel begins a UTF-8 file with a mark, which would be part of the first column's name.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TableError(f"cannot read {path}: line {line} is not UTF-8; save it as UTF-8") from error


class _Lines:
    """The lines of a text, which can be gone back to."""

    def __init__(self, text: str) -> None:
        # By these line ends alone: a caption may hold other characters at which `splitlines` would cut it.
        self._lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self.next = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.next >= len(self._lines):
            raise StopIteration
        self.next += 1
        return f"{self._lines[self.next - 1]}\n"


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the line and the cells of each record, or why it is none; then it goes on with the line after it."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = lines.next
        try:
            yield start + 1, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is not closed swallows the lines up to the next one: only the first is at fault.
            several = lines.next > start + 1
            lines.next = start + 1
            yield start + 1, "a quote that is not closed" if several else f"quotes do not match: {error}"
