from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.build.errors import BuildError
from training.build.pairs import BadRow, ImageTextPair
from training.build.sources import open_sources


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder: Path, text: str) -> Path:
    (folder / "a.png").write_bytes(png())
    (folder / "pairs.csv").write_text(text)
    return folder


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> list[ImageTextPair | BadRow]:
    (source,) = open_sources([path])
    return list(source.read(0, len(source)))


def test_a_csv_gives_pairs_with_their_labels(tmp_path: Path) -> None:
    (found,) = read(table(tmp_path, "path,caption,gender,split\na.png, a cook ,Female,val\n"))
    assert found == ImageTextPair(0, "a.png", png(), "a cook", gender="woman", split="validation")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("missing.png,x,", "cannot be read: No such file"),
        ("a.png,  ,", "no caption"),
        ("../a.png,x,", "leads out of the table's folder"),
        (",x,", "the path is empty"),
        ("a.png,x,robot", "gender 'robot' is none of"),
    ],
)
def test_a_bad_row_is_told_and_its_neighbours_are_read(tmp_path: Path, row: str, reason: str) -> None:
    bad, good = read(table(tmp_path, f"path,caption,gender\n{row}\na.png,fine,\n"))
    assert isinstance(bad, BadRow)
    assert reason in bad.reason
    assert isinstance(good, ImageTextPair)


def test_parquet_reads_like_csv_and_nulls_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    columns = {"filepath": ["a.png", "a.png"], "title": ["one", None], "profession": [None, "cook"]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    good, bad = read(tmp_path)
    assert good == ImageTextPair(0, "a.png", png(), "one")
    assert bad == BadRow(1, "a.png", "no caption")


def test_a_shard_joins_members_by_key(tmp_path: Path) -> None:
    labels = json.dumps({"gender": "man", "label": "cook"}).encode()
    path = shard(
        tmp_path / "0.tar",
        {
            "x/1.png": png(), "x/1.txt": b"a man cooks", "x/1.json": labels,
            "2.webp": b"?", "2.json": json.dumps({"caption": "two"}).encode(),
            "3.txt": b"no image", "4.jpg": b"?", "4.json": b"[",
        },
    )  # fmt: skip
    one, two, three, four = read(path)
    assert one == ImageTextPair(0, "x/1", png(), "a man cooks", gender="man", label="cook")
    assert isinstance(two, ImageTextPair) and two.caption == "two"
    assert isinstance(three, BadRow) and "no image" in three.reason
    assert isinstance(four, BadRow) and "json" in four.reason


def test_a_digest_changes_with_a_caption_and_with_the_size_of_an_image(tmp_path: Path) -> None:
    def digest() -> str:
        (source,) = open_sources([tmp_path])
        return source.digest(0, len(source))

    table(tmp_path, "path,caption\na.png,one\n")
    first = digest()
    assert digest() == first
    (tmp_path / "a.png").write_bytes(png() + b" ")
    second = digest()
    table(tmp_path, "path,caption\na.png,two\n")
    assert len({first, second, digest()}) == 3


@pytest.mark.parametrize("suffix", ["txt", "caption", "json"])
def test_a_shards_digest_changes_with_what_is_said_in_as_many_bytes(tmp_path: Path, suffix: str) -> None:
    def digests(said: str) -> list[str]:
        members = {"1.png": png(), f"1.{suffix}": f'{{"caption": "{said}"}}'.encode(), "2.png": png()}
        (source,) = open_sources([shard(tmp_path / "0.tar", members)])
        return [source.digest(row, row + 1) for row in range(2)]

    first, other = digests("one"), digests("two")
    assert digests("one") == first
    assert first[0] != other[0]
    assert first[1] == other[1]


def test_a_row_has_its_images_key_without_reading_it(tmp_path: Path) -> None:
    (source,) = open_sources([table(tmp_path, "caption,path\nx, a.png \ny,\n")])
    assert [source.key(row) for row in range(2)] == ["a.png", ""]
    (source,) = open_sources([shard(tmp_path / "0.tar", {"x/1.png": b"", "2.txt": b""})])
    assert [source.key(row) for row in range(2)] == ["x/1", "2"]


@pytest.mark.parametrize("text", ["caption\nx\n", "path\na.png\n"])
def test_a_table_without_a_needed_column_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BuildError, match="has no column"):
        open_sources([table(tmp_path, text)])


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w:gz"):
        pass
    with pytest.raises(BuildError, match="uncompressed tar"):
        open_sources([tmp_path])
