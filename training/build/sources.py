"""Opening what a user names with ``--pairs``: a table, a shard, or a folder of these, or of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.build.errors import BuildError
from training.build.pairs import Source
from training.build.shards import Folder, Shard
from training.build.tables import COLUMN_TABLES, TEXT_TABLES, Columns, Table

SHARD = ".tar"
KNOWN = (*TEXT_TABLES, *COLUMN_TABLES, SHARD)
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Open tables, shards and folders.

    Parameters
    ----------
    paths : sequence of Path
        Tables, tars, and folders of either, whose files are taken by name. Where a folder has none, those of the
        folders in it are; and where there are none at all, its pictures with the texts beside them.

    Raises
    ------
    BuildError
        Where there is nothing to read, a file is compressed, or two share a name.
    """
    sources: list[Source] = []
    for path in paths:
        if path.is_dir():
            sources += _open_folder(path)
        elif path.is_file():
            sources.append(_open(path, path.name))
        else:
            raise BuildError(f"{path}: no such file or folder")
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BuildError(f"two files of pairs are called {', '.join(twice)}: rename one")
    return sources


def _open(path: Path, name: str) -> Source:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise BuildError(f"{path} is compressed: unpack it")
    if suffix not in KNOWN:
        raise BuildError(f"{path}: no {', '.join(KNOWN)} to read pairs from")
    if suffix == SHARD:
        return Shard(path, name)
    return Table(path, name) if suffix in TEXT_TABLES else Columns(path, name)


def _open_folder(folder: Path) -> list[Source]:
    chosen = _chosen(folder, folder.glob("*")) or _chosen(folder, folder.rglob("*"))
    if chosen:
        return [_open(file, file.relative_to(folder).as_posix()) for file in chosen]
    pictures = Folder(folder)
    if not len(pictures):
        raise BuildError(
            f"{folder}: no {', '.join(KNOWN)} to read pairs from, and no pictures with a text beside them"
        )
    return [pictures]


def _chosen(folder: Path, files: object) -> list[Path]:
    found = []
    for file in sorted(files):  # type: ignore[call-overload]
        inside = file.relative_to(folder)
        # What macOS puts beside files, and what `datasets` remembers of a computation, is nobody's data.
        if any(part.startswith(".") or part == "__MACOSX" for part in inside.parts) or not file.is_file():
            continue
        if file.name.startswith("cache-") and file.suffix == ".arrow":
            continue
        if file.suffix.lower() in COMPRESSED and Path(file.stem).suffix.lower() in (*KNOWN, ""):
            raise BuildError(f"{file} is compressed: unpack it, or name the files to read")
        if file.suffix.lower() in KNOWN and not _describes(file):
            found.append(file)
    return found


def _describes(file: Path) -> bool:
    """Return whether a table only describes what lies beside it: img2dataset writes one to each shard and folder."""
    beside = file.with_suffix("")
    return file.suffix.lower() == ".parquet" and (file.with_suffix(SHARD).is_file() or beside.is_dir())
