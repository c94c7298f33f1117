"""Image-text pairs as users keep them, and the rows of them that cannot be used.

A source counts its rows without reading images, and reads any range of them, so that work can be dealt out and taken
up again. A row that cannot be used is a `BadRow` with the reason: it never stops a build, and it is never left out in
silence. `training.build.sources` opens what a user names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monofacet._tables import COLUMNS, TableError, gender_of, split_of, texts_of

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
LABELS = ("gender", "profession", "label", "group", "split")
# Of a reason or a key in the list of bad rows: it is for people.
MAX_TOLD = 200


@dataclass(frozen=True)
class ImageTextPair:
    """One image with one caption.

    Attributes
    ----------
    row : int
        Its place in the source; the pairs of an image with several captions in one row share it.
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


class Unusable(Exception):
    """Why a row is a bad one."""


class Source(ABC):
    """Where pairs come from.

    Parameters
    ----------
    name : str
        Of the file, for people.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows, bad ones included."""

    @abstractmethod
    def key(self, row: int) -> str:
        """Return what names the image of a row, as `Pair.key`."""

    @abstractmethod
    def digest(self, start: int, stop: int) -> str:
        """Return a hash over what the rows say and how large their images are; no image is read."""

    @abstractmethod
    def _check(self, row: int) -> object:
        """Raise `Unusable` where a row is known to be bad before its image is read."""

    @abstractmethod
    def _pairs(self, row: int) -> list[ImageTextPair]:
        """Return the pairs of a row, or raise `Unusable`."""

    def broken(self) -> Iterator[BadRow]:
        """Return the rows that are known to be bad before an image is read."""
        for row in range(len(self)):
            try:
                self._check(row)
            except Unusable as error:
                yield bad_row(row, self.key(row), str(error))

    def read(self, start: int, stop: int) -> Iterator[ImageTextPair | BadRow]:
        """Read rows in order."""
        for row in range(start, stop):
            try:
                yield from self._pairs(row)
            except Unusable as error:
                yield bad_row(row, self.key(row), str(error))
            except OSError as error:
                yield bad_row(row, self.key(row), f"cannot be read: {error.strerror}")


def bad_row(row: int, key: str, reason: str) -> BadRow:
    """Return a bad row whose key and reason fit on a line."""
    return BadRow(row, _in_a_line(key), _in_a_line(reason))


def _in_a_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_TOLD else f"{line[: MAX_TOLD - 1]}…"


def scalar(value: Any, what: str) -> str:
    """Return a value of a row as text; "" for none.

    Raises
    ------
    Unusable
        Where it is no text and no number.
    """
    # A missing number in a parquet column of texts is NaN, which differs from itself.
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise Unusable(f"{what} is a {type(value).__name__}, not a text")


def captions(value: Any) -> list[str]:
    """Return the captions of a row: several where it has a list of them, which make a pair each.

    Raises
    ------
    Unusable
        Where there is none, or it is no text.
    """
    if isinstance(value, list | tuple):
        found = [scalar(item, "a caption in the list") for item in value]
    else:
        found = texts_of(scalar(value, "the caption"))
    found = [text for text in found if text]
    if not found:
        raise Unusable("no caption")
    return found


def checked_labels(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of a row in our own words; `fields` by what they are for."""
    labels = {name: scalar(fields.get(name), name) for name in LABELS}
    try:
        labels["gender"], labels["split"] = gender_of(labels["gender"]), split_of(labels["split"])
    except TableError as error:
        raise Unusable(str(error)) from error
    return labels


def meant(fields: Mapping[str, Any], wanted: Sequence[str] = tuple(COLUMNS)) -> dict[str, Any]:
    """Return the fields of a JSON object by what they are for.

    Raises
    ------
    Unusable
        Where two fields for the same thing say different things.
    """
    plain = {str(name).strip().lower().replace(" ", "_").replace("-", "_"): name for name in fields}
    found: dict[str, Any] = {}
    for meaning in wanted:
        named = [
            plain[name]
            for name in COLUMNS[meaning]
            if name in plain and fields[plain[name]] not in (None, "", [])
        ]
        if any(fields[name] != fields[named[0]] for name in named):
            raise Unusable(f"{' and '.join(named)} both stand for {meaning}, and differ")
        if named:
            found[meaning] = fields[named[0]]
    return found
