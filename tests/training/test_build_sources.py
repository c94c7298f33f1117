"""What img2dataset, webdataset, Hugging Face `datasets`, Kaggle and hands write, as sources of pairs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.test_build_pairs import png, read, shard
from training.build.errors import BuildError
from training.build.pairs import MAX_TOLD, BadRow, ImageTextPair
from training.build.sources import open_sources

Member = tuple[str, bytes]


def samples(start: int, stop: int) -> dict[str, bytes]:
    return {
        name: data
        for i in range(start, stop)
        for name, data in ((f"{i:05d}.png", png()), (f"{i:05d}.txt", f"caption {i}".encode()))
    }


def captions(found: Sequence[ImageTextPair | BadRow]) -> list[str]:
    return [item.caption for item in found if isinstance(item, ImageTextPair)]


def reasons(found: Sequence[ImageTextPair | BadRow]) -> list[str]:
    return [item.reason for item in found if isinstance(item, BadRow)]


def ordered(path: Path, members: Sequence[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar whose names may repeat."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def place(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def test_tars_joined_by_cat_are_read_to_the_end(tmp_path: Path) -> None:
    a, b = shard(tmp_path / "a.tar", samples(0, 5)), shard(tmp_path / "b.tar", samples(5, 9))
    joined = tmp_path / "all.tar"
    # With gigabytes of zeros between them it would be the same.
    joined.write_bytes(a.read_bytes() + bytes(512 * 5000) + b.read_bytes() + a.read_bytes())
    found = read(joined)
    assert reasons(found) == []
    # The last one has the first one's keys again: samples of their own.
    assert captions(found) == [f"caption {i}" for i in (*range(9), *range(5))]


def test_a_key_that_comes_again_is_a_sample_of_its_own_or_a_bad_row(tmp_path: Path) -> None:
    image = png()
    members = [
        ("0.png", image), ("0.txt", b"one"), ("0.png", image), ("0.txt", b"two"),
        ("1.png", image), ("2.png", image), ("1.txt", b"three"), ("2.txt", b"four"), ("2.txt", b"five"),
    ]  # fmt: skip
    found = read(ordered(tmp_path / "0.tar", members))
    assert captions(found) == ["one", "two", "three", "four"]
    assert reasons(found) == ["no image (png, jpg, jpeg, webp), but txt"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_damaged_header_is_a_bad_row_and_what_follows_is_read(form: int, tmp_path: Path) -> None:
    path = ordered(tmp_path / "0.tar", list(samples(0, 20).items()), form)
    data = bytearray(path.read_bytes())
    lost = place(path, "00007.png")
    data[lost.offset : lost.offset + 512] = b"\xff" * 512
    path.write_bytes(bytes(data))
    found = read(path)
    assert captions(found) == [f"caption {i}" for i in range(20) if i != 7]
    no_image, damaged = reasons(found)
    assert no_image.startswith("no image")
    size = 512 + -(-len(png()) // 512) * 512
    assert damaged.startswith(f"{size:,} bytes of the archive cannot be read")


@pytest.mark.parametrize(
    ("cut", "expected", "reason"),
    [
        (lambda m, size: m.offset_data + 20, 7, "00007.png is cut off: the archive ends within it"),
        (lambda m, size: m.offset + 100, 7, "100 bytes of the archive cannot be read: truncated header"),
        (lambda m, size: m.offset, 7, "the archive has no end: what followed was cut off"),
    ],
    ids=["in the data", "in a header", "between members"],
)
def test_an_archive_that_is_cut_off_says_so(cut: Any, expected: int, reason: str, tmp_path: Path) -> None:
    path = ordered(tmp_path / "0.tar", list(samples(0, 20).items()))
    path.write_bytes(path.read_bytes()[: cut(place(path, "00007.png"), path.stat().st_size)])
    found = read(path)
    assert captions(found) == [f"caption {i}" for i in range(expected)]
    assert reasons(found) == [reason]


def test_a_whole_archive_has_no_bad_row(tmp_path: Path) -> None:
    assert reasons(read(ordered(tmp_path / "0.tar", list(samples(0, 3).items())))) == []


def test_links_in_an_archive_are_told(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("0.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    assert reasons(read(path)) == ["0.png is a link inside the archive"]


def test_a_key_may_have_dots_and_a_suffix_any_case(tmp_path: Path) -> None:
    members = {
        "shot 1.5.PNG": png(), "shot 1.5.TXT": b"one", "shot 1.6.png": png(), "shot 1.6.txt": b"two",
        "x/a.jpg.png": png(), "x/a.jpg.txt": b"three",
    }  # fmt: skip
    found = read(shard(tmp_path / "0.tar", members))
    assert captions(found) == ["one", "two", "three"]
    assert [item.key for item in found] == ["shot 1.5", "shot 1.6", "x/a.jpg"]


def test_more_files_of_a_sample_are_passed_over(tmp_path: Path) -> None:
    members = {
        "./._1.png": b"\0\5\x16\7", "./1.png": png(), "./1.mask.png": png(), "./1.txt": b"one", "./1.npy": b"",
        "__MACOSX/1.png": b"", "readme": b"",
    }  # fmt: skip
    (found,) = read(shard(tmp_path / "0.tar", members))
    assert isinstance(found, ImageTextPair) and found.caption == "one"


def test_captions_that_are_a_list_make_a_pair_each(tmp_path: Path) -> None:
    said = {"caption": ["one", " two ", ""], "gender": "f"}
    path = shard(tmp_path / "0.tar", {"1.png": png(), "1.json": json.dumps(said).encode()})
    found = read(path)
    assert captions(found) == ["one", "two"]
    assert {(item.row, item.key, item.gender) for item in found if isinstance(item, ImageTextPair)} == {
        (0, "1", "woman")
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"caption": []}, "no caption"),
        ({"caption": [{"raw": "x"}]}, "a caption in the list is a dict, not a text"),
        ({"caption": {"raw": "x"}}, "the caption is a dict, not a text"),
        ({"caption": "one", "title": "two"}, "caption and title both stand for text, and differ"),
        ({"caption": "one", "label": [1]}, "label is a list, not a text"),
    ],
)
def test_json_that_does_not_say_one_thing_is_a_bad_row(fields: Any, reason: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {"1.png": png(), "1.json": json.dumps(fields).encode()})
    assert reasons(read(path)) == [reason]


def test_a_text_beside_a_picture_is_its_caption_whatever_the_json_says(tmp_path: Path) -> None:
    said = json.dumps({"caption": "two", "title": "three", "Gender": "Male"}).encode()
    (found,) = read(
        shard(tmp_path / "0.tar", {"1.png": png(), "1.txt": b"\xef\xbb\xbfone\n", "1.json": said})
    )
    assert isinstance(found, ImageTextPair) and (found.caption, found.gender) == ("one", "man")


def test_img2datasets_folder_is_taken_as_it_comes(tmp_path: Path) -> None:
    said = {
        "caption": "one",
        "url": "http://x",
        "key": "0",
        "status": "success",
        "error_message": None,
        "exif": "{}",
    }
    shard(tmp_path / "00000.tar", {"0.jpg": png(), "0.txt": b"one", "0.json": json.dumps(said).encode()})
    columns = {name: [value] * 3 for name, value in said.items()}
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "._00000.tar").write_bytes(b"\0\5\x16\7")
    assert captions(read(tmp_path)) == ["one"]


def test_img2datasets_parquet_is_taken_without_what_was_not_downloaded(tmp_path: Path) -> None:
    columns = {
        "jpg": [png(), None, png("blue")], "caption": ["one", "lost", "two"], "key": ["0", "1", "2"],
        "status": ["success", "failed_to_download", "success"],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    found = read(tmp_path)
    assert captions(found) == ["one", "two"] and reasons(found) == []
    assert isinstance(found[1], ImageTextPair) and found[1].image == png("blue")


def test_img2datasets_files_are_taken_with_the_texts_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(png())
        (folder / f"{i}.txt").write_text(f"caption {i}")
        (folder / f"{i}.json").write_text(json.dumps({"caption": f"caption {i}", "status": "success"}))
    (folder / "2.jpg").write_bytes(png())
    pq.write_table(
        pa.table({"caption": ["x"], "key": ["0"], "status": ["success"]}), tmp_path / "00000.parquet"
    )
    (tmp_path / "readme.txt").write_text("read me")
    found = read(tmp_path)
    assert captions(found) == ["caption 0", "caption 1"]
    assert [(item.key, item.reason) for item in found if isinstance(item, BadRow)] == [
        ("00000/2", "no caption")
    ]


def hugging_face(names: Sequence[str | None], texts: Sequence[Any], **more: Any) -> pa.Table:
    images = [{"bytes": png(), "path": name} for name in names]
    return pa.table({"image": images, "text": texts, **more})


def test_what_hugging_face_writes_is_taken_as_parquet_and_as_arrow(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(7)]
    made = hugging_face(names, [f"caption {i}" for i in range(7)], filename=names, label=list(range(7)))
    (tmp_path / "data").mkdir()
    pq.write_table(made, tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=3)
    found = read(tmp_path)
    assert captions(found) == [f"caption {i}" for i in range(7)]
    assert [(item.key, item.image) for item in found if isinstance(item, ImageTextPair)] == [
        (name, png()) for name in names
    ]
    (source,) = open_sources([tmp_path])
    assert source.name == "data/train-00000-of-00001.parquet"
    assert captions(list(source.read(5, 6))) == ["caption 5"]
    saved = tmp_path / "saved"
    saved.mkdir()
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, made.schema) as out,
    ):
        out.write_table(made, max_chunksize=2)
    (saved / "cache-1234.arrow").write_bytes(b"not a table")
    (saved / "state.json").write_text("{}")
    assert read(saved) == found


def test_embedded_pictures_that_are_missing_are_told_without_their_bytes(tmp_path: Path) -> None:
    images = [
        {"bytes": None, "path": "0.png"},
        {"bytes": None, "path": "../0.png"},
        {"bytes": None, "path": None},
        None,
    ]
    (tmp_path / "0.png").write_bytes(png())
    table = pa.table({"image": images, "caption": [["one", "two"], ["x"], ["x"], ["x"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = read(tmp_path)
    assert captions(found) == ["one", "two"]
    assert reasons(found) == ["the path is empty or leads out of the table's folder", "no image", "no image"]
    assert [item.key for item in found[2:]] == ["../0.png", "row 2", "row 3"]


def test_an_image_folder_with_its_metadata_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        '{"file_name": "a.png", "text": ["one", "two"]}',
        "",
        "[1]",
        "{",
        '{"file_name": {"a": 1}, "text": "x"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = read(tmp_path)
    assert captions(found) == ["one", "two"]
    assert [r.partition(":")[0] for r in reasons(found)] == [
        "its json is not an object", "its json cannot be read", "the path is a dict, not a text",
    ]  # fmt: skip


def test_a_table_beside_a_folder_of_pictures_is_taken(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images" / "a.png").write_bytes(png())
    (tmp_path / "captions.CSV").write_text("Image,Caption\na.png,one\nb.png,two\n")
    (tmp_path / "._captions.csv").write_bytes(b"\0\5\x16\7")
    found = read(tmp_path)
    assert captions(found) == ["one"]
    assert reasons(found) == ["cannot be read: No such file or directory"]


def test_commas_without_quotes_are_bad_rows_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text('path,caption\na.png,a, b\n,\na.png,"a, b"\n')
    bad, good = read(tmp_path)
    assert bad == BadRow(0, "(line 2)", "3 cells for 2 columns: a text with a comma must stand in quotes")
    assert isinstance(good, ImageTextPair) and good.caption == "a, b"


def test_a_link_out_of_the_folder_is_not_followed_and_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(png())
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "pictures").symlink_to(tmp_path / "elsewhere")
    (folder / "t.csv").write_text("path,caption\npictures/a.png,one\n")
    assert reasons(read(folder)) == [
        "the path leads out of the table's folder by a link, which is not followed"
    ]


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "t.csv.gz", "train.parquet.zst"])
def test_compressed_files_are_refused_and_not_passed_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\n")
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(BuildError, match="is compressed: unpack it"):
            open_sources([path])


def test_what_is_told_of_a_bad_row_fits_a_line(tmp_path: Path) -> None:
    rows = pa.table({"path": ["x" * 5000, "a\nb.png"], "caption": ["a", "b"]})
    pq.write_table(rows, tmp_path / "t.parquet")
    for item in read(tmp_path):
        assert isinstance(item, BadRow)
        assert "\n" not in item.key + item.reason
        assert len(item.key) <= MAX_TOLD and len(item.reason) <= MAX_TOLD


def test_a_folder_without_anything_to_read_says_what_could_be(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(BuildError, match=r"no \.csv, .*\.tar to read pairs from, and no pictures"):
        open_sources([tmp_path])
    with pytest.raises(BuildError, match="no such file or folder"):
        open_sources([tmp_path / "gone"])
