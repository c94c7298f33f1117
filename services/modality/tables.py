"""The tables of a bundle, one row a feature, and the feature cards: their columns are named only here."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.errors import BundleFileError, UnknownFeature

# Bytes that a table of a bundle may decode to, whatever its file's size, and how often its file's size.
MAX_DECODED, MAX_RATIO = 256 * 2**20, 50

MODALITY_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("label", pa.string()),
        ("mds_energy", pa.float32()),
        ("mds_energy_low", pa.float32()),
        ("mds_energy_high", pa.float32()),
        ("mds_paper", pa.float32()),
        ("paper_label", pa.string()),
        ("paper_pairs", pa.int32()),
        ("coactivation", pa.float32()),
        ("coactivation_p", pa.float32()),
        ("coactivation_q", pa.float32()),
        ("coactivation_significant", pa.bool_()),
        ("firing_rate_image", pa.float32()),
        ("firing_rate_text", pa.float32()),
        ("energy_image", pa.float32()),
        ("energy_text", pa.float32()),
        ("name", pa.string()),
        ("name_npmi", pa.float32()),
        ("name_auc", pa.float32()),
        ("emb_sim_image", pa.float32()),
        ("emb_sim_text", pa.float32()),
        ("win_rate_image", pa.float32()),
        ("win_rate_text", pa.float32()),
        ("name_auc_low", pa.float32()),
        ("name_auc_high", pa.float32()),
        ("name_count", pa.int32()),
    ]
)
# Columns that came later; tables of before are read without them.
MODALITY_ADDED = ("name_auc_low", "name_auc_high", "name_count")
MODALITY_COLUMNS: tuple[str, ...] = tuple(MODALITY_SCHEMA.names)

CARDS_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("modality", pa.string()),  # "image" or "text"
        ("rank", pa.int32()),  # 0 is the strongest
        ("activation", pa.float32()),
        ("sample", pa.string()),  # key of the thumbnails, empty for a text
        ("text", pa.string()),  # the text itself, or the image's caption
    ]
)
CARDS_COLUMNS: tuple[str, ...] = tuple(CARDS_SCHEMA.names)

CARD_IMAGES_SCHEMA = pa.schema([("sample", pa.string()), ("webp", pa.binary())])


class Label(StrEnum):
    """What a feature is about."""

    IMAGE = "IMAGE"
    TEXT = "TEXT"
    CROSS = "CROSS"
    UNRESOLVED = "UNRESOLVED"
    DEAD = "DEAD"


@dataclass(frozen=True)
class ModalityTable:
    """One row a feature; the columns of `MODALITY_SCHEMA` as arrays of length n.

    Float columns are NaN where undefined (a dead feature, a statistic not computed); `label` and
    `paper_label` hold the values of `Label`; `name` is empty without a name.
    """

    feature: NDArray[np.int32]
    label: NDArray[np.str_]
    mds_energy: NDArray[np.float32]
    mds_energy_low: NDArray[np.float32]
    mds_energy_high: NDArray[np.float32]
    mds_paper: NDArray[np.float32]
    paper_label: NDArray[np.str_]
    paper_pairs: NDArray[np.int32]
    coactivation: NDArray[np.float32]
    coactivation_p: NDArray[np.float32]
    coactivation_q: NDArray[np.float32]
    coactivation_significant: NDArray[np.bool_]
    firing_rate_image: NDArray[np.float32]
    firing_rate_text: NDArray[np.float32]
    energy_image: NDArray[np.float32]
    energy_text: NDArray[np.float32]
    name: NDArray[np.str_]
    name_npmi: NDArray[np.float32]
    name_auc: NDArray[np.float32]
    emb_sim_image: NDArray[np.float32]
    emb_sim_text: NDArray[np.float32]
    win_rate_image: NDArray[np.float32]
    win_rate_text: NDArray[np.float32]
    name_auc_low: NDArray[np.float32]
    name_auc_high: NDArray[np.float32]
    name_count: NDArray[np.int32]

    def __len__(self) -> int:
        """Return n, the number of features."""
        return len(self.feature)

    def row(self, feature: int) -> dict[str, Any]:
        """Return one feature's row as Python values.

        Raises
        ------
        UnknownFeature
            Where the dictionary has no such feature.
        """
        if not 0 <= feature < len(self):
            raise UnknownFeature.numbered(feature, len(self))
        return {column: getattr(self, column)[feature].item() for column in MODALITY_COLUMNS}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any], n_features: int) -> ModalityTable:
        """Build a table from the columns at hand, filling the others with "undefined".

        Parameters
        ----------
        columns : mapping of str to array, shape (n_features,)
            Any of `MODALITY_COLUMNS`.
        n_features : int
            n.
        """
        unknown = sorted(set(columns) - set(MODALITY_COLUMNS))
        if unknown:
            raise ValueError(f"not columns of a modality table: {', '.join(unknown)}")
        empty = {
            pa.float32(): np.full(n_features, np.nan, np.float32),
            pa.int32(): np.zeros(n_features, np.int32),
            pa.string(): np.full(n_features, ""),
            pa.bool_(): np.zeros(n_features, bool),
        }
        complete: dict[str, Any] = {}
        for column in MODALITY_SCHEMA:
            default = (
                np.arange(n_features, dtype=np.int32) if column.name == "feature" else empty[column.type]
            )
            values = np.asarray(columns.get(column.name, default))
            if values.shape != (n_features,):
                raise ValueError(f"column {column.name} has shape {values.shape}, not ({n_features},)")
            complete[column.name] = values.astype(np.str_ if column.type == pa.string() else default.dtype)
        return cls(**complete)

    def with_columns(self, **columns: Any) -> ModalityTable:
        """Return a copy with some columns replaced (names, EmbSim and WinRate are added in a later step)."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return self.from_columns({**present, **columns}, len(self))

    @classmethod
    def read(cls, path: Path) -> ModalityTable:
        """Read a table from parquet.

        Raises
        ------
        BundleFileError
            Where the columns are not those of `MODALITY_SCHEMA`, or the features not 0, 1, ..., n - 1.
        """
        table = read_parquet(path, MODALITY_SCHEMA, MODALITY_ADDED)
        columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
        if not np.array_equal(columns["feature"], np.arange(table.num_rows)):
            raise BundleFileError(f"{path.name}: features must be 0, 1, ..., in order")
        return cls.from_columns(columns, table.num_rows)

    def write(self, path: Path) -> None:
        """Write the table as parquet."""
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: getattr(self, name).tolist() for name in MODALITY_COLUMNS}
        pq.write_table(pa.table(columns, schema=MODALITY_SCHEMA), path, compression="zstd")


@dataclass(frozen=True)
class CardSample:
    """One of the samples that a feature fires on most.

    Attributes
    ----------
    rank : int
        0 is the strongest.
    activation : float
        z_j of the sample.
    sample : str
        Key of the thumbnail; empty for a text.
    text : str
        The text, or the image's caption.
    thumbnail : bytes
        WebP; empty for a text, or where the bundle ships none.
    """

    rank: int
    activation: float
    sample: str
    text: str
    thumbnail: bytes = b""


@dataclass(frozen=True)
class Cards:
    """The top images and texts of every feature of one dictionary.

    Attributes
    ----------
    table : pyarrow.Table
        With `CARDS_SCHEMA`.
    thumbnails : mapping of str to bytes
        WebP images by sample key.
    """

    table: pa.Table
    thumbnails: Mapping[str, bytes]

    @cached_property
    def _rows(self) -> dict[tuple[int, str], list[int]]:
        rows: dict[tuple[int, str], list[int]] = {}
        keys = zip(
            self.table.column("feature").to_pylist(), self.table.column("modality").to_pylist(), strict=True
        )
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        return rows

    def top(self, feature: int, modality: str, limit: int) -> list[CardSample]:
        """Return up to `limit` samples of one modality, strongest first; none if it never fires."""
        # Typed: Arrow takes an empty list for one of nulls, and refuses it.
        rows = pa.array(self._rows.get((feature, modality), []), pa.int64())
        taken = self.table.take(rows).sort_by("rank").slice(0, limit).to_pylist()
        return [
            CardSample(
                row["rank"], row["activation"], row["sample"], row["text"],
                self.thumbnails.get(row["sample"], b""),
            )
            for row in taken
        ]  # fmt: skip

    @classmethod
    def read(cls, path: Path, thumbnails: Mapping[str, bytes]) -> Cards:
        """Read cards from parquet, checking the columns."""
        return cls(read_parquet(path, CARDS_SCHEMA), thumbnails)


def write_cards(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write feature cards, rows being mappings with `CARDS_COLUMNS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=CARDS_SCHEMA), path, compression="zstd")


def write_thumbnails(path: Path, thumbnails: Mapping[str, bytes]) -> None:
    """Write the thumbnails (WebP bytes by sample key) that a bundle's cards share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"sample": key, "webp": data} for key, data in sorted(thumbnails.items())]
    # WebP is compressed already.
    pq.write_table(pa.Table.from_pylist(rows, schema=CARD_IMAGES_SCHEMA), path, compression="none")


def read_thumbnails(path: Path) -> dict[str, bytes]:
    """Read what `write_thumbnails` wrote."""
    table = read_parquet(path, CARD_IMAGES_SCHEMA)
    return dict(zip(table.column("sample").to_pylist(), table.column("webp").to_pylist(), strict=True))


def read_parquet(path: Path, schema: pa.Schema, may_lack: Sequence[str] = ()) -> pa.Table:
    """Read a parquet file that must have exactly `schema`'s columns, though it may lack those of `may_lack`.

    A file of 2 kB can stand for gigabytes: one long text, repeated. What it decodes to is bounded before it is made, by
    `MAX_DECODED`, or `MAX_RATIO` times the file where that is more.

    Raises
    ------
    BundleFileError
        Where the file is not parquet, has other columns, or decodes to more than the bound.
    """
    try:
        # Texts as dictionaries: then a repeated one is in memory once. Not by `read_table`, which is for data sets
        # of many files and imports pandas, where that is installed.
        texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
        file = pq.ParquetFile(io.BytesIO(path.read_bytes()), read_dictionary=texts)
        bound = max(MAX_DECODED, MAX_RATIO * path.stat().st_size)
        metadata = file.metadata
        stored = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        # No number is wider than 8 bytes, and a text has an index of 4.
        if max(stored, metadata.num_rows * 8 * metadata.num_columns) > bound:
            raise BundleFileError(
                f"{path.name}: {metadata.num_rows:,} rows decode to more than {bound:,} bytes"
            )
        table = file.read()
        decoded = sum(_decoded_bytes(table.column(name)) for name in set(texts) & set(table.column_names))
        if decoded > bound:
            raise BundleFileError(f"{path.name}: its texts decode to {decoded:,} bytes, more than {bound:,}")
    except (pa.ArrowException, OSError) as error:
        raise BundleFileError(f"{path.name} cannot be read as parquet: {error}") from error
    lacking = set(may_lack) - set(table.column_names)
    schema = pa.schema([field for field in schema if field.name not in lacking])
    if set(table.column_names) != set(schema.names):
        difference = sorted(set(table.column_names) ^ set(schema.names))
        raise BundleFileError(f"{path.name}: columns that are missing or unknown: {', '.join(difference)}")
    nulls = [name for name in schema.names if table.column(name).null_count]
    if nulls:
        # What is undefined is NaN or an empty string; a null would become the text "None".
        raise BundleFileError(f"{path.name}: columns with nulls: {', '.join(nulls)}")
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise BundleFileError(f"{path.name}: {error}") from error


def _decoded_bytes(column: pa.ChunkedArray) -> int:
    """Return how many bytes the texts of a dictionary column take when each row has its own."""
    total = 0
    for chunk in column.chunks:
        if not pa.types.is_dictionary(chunk.type):
            total += chunk.nbytes
        else:
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total
