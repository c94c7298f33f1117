"""Tables of inputs as people write them: the one reader of the command line and of builds."""

from __future__ import annotations

from pathlib import Path

import monofacet
import pytest
from monofacet._tables import (
    COLUMNS,
    GENDERS,
    NONE,
    TableError,
    gender_of,
    help_text,
    picture_folder,
    read_csv,
    split_of,
    texts_of,
)
from monofacet.cli._gender import read_labels
from monofacet.cli._modality import _read_pairs


def write(folder: Path, text: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def told(path: Path) -> list[tuple[int, str, str]]:
    return [(row.line, row.cells.get("text", ""), row.problem) for row in read_csv(path).rows]


@pytest.mark.parametrize(
    ("meaning", "column"), [(meaning, name) for meaning, names in COLUMNS.items() for name in names]
)
def test_a_column_goes_by_each_of_its_names_in_any_case(meaning: str, column: str, tmp_path: Path) -> None:
    for written in (column, column.upper(), f" {column.replace('_', ' ').title()} "):
        table = read_csv(write(tmp_path, f"x,{written}\n1,said\n"))
        assert table.rows[0].cells == {meaning: "said"}


def test_no_name_of_a_column_stands_for_two_things() -> None:
    names = [name for names in COLUMNS.values() for name in names]
    assert len(names) == len(set(names))


def test_words_for_genders_and_splits() -> None:
    assert {gender_of(word) for word in ("woman", "Female", " F ")} == {"woman"}
    assert {gender_of(word) for word in ("man", "MALE", "m")} == {"man"}
    assert {gender_of(word) for word in ("", " ", *NONE, "NaN", "Unknown")} == {""}
    assert [split_of(word) for word in ("Train", "restval", "val", "dev", "test", "")] == [
        "train", "train", "validation", "validation", "test", "",
    ]  # fmt: skip
    for word in ("0", "other", "womann", "robot"):
        with pytest.raises(TableError, match=f"gender '{word}' is none of woman, female, f, man"):
            gender_of(word)


@pytest.mark.parametrize(
    "header", ["image,text,Caption", "file,path,text", "image,text,gender,sex", "image,text,text"]
)
def test_two_columns_for_one_thing_are_refused_in_a_line(header: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"{header}\na,b,c,d\n")
    with pytest.raises(TableError, match="both stand for .*: rename one") as raised:
        read_csv(path)
    assert "\n" not in str(raised.value)
    # A table may have two of what nobody reads.
    assert read_csv(path, ("profession",)).columns == {}


def test_a_comma_without_quotes_is_a_row_with_a_problem_and_blank_rows_are_none(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'image,text\n\na.png,"red, round"\n,\nb.png,red, round\n   ,  \nc.png,blue,,\nd.png\n\n',
    )
    (good, comma, empties, short) = read_csv(path).rows
    assert (good.line, good.cells, good.problem) == (3, {"image": "a.png", "text": "red, round"}, "")
    assert (comma.line, comma.problem) == (
        5,
        "3 cells for 2 columns: a text with a comma must stand in quotes",
    )
    assert (empties.line, empties.cells["text"], empties.problem) == (7, "blue", "")
    # A cell that is not there is not an empty one.
    assert (short.line, short.cells, short.problem) == (8, {"image": "d.png"}, "")


def test_a_quote_that_is_not_closed_costs_its_own_row_alone(tmp_path: Path) -> None:
    rows = [
        'a.png,"a row',
        "b.png,plain",
        'c.png,"quoted"',
        'd.png,"5" disk',
        'e.png,say "hi"',
        'f.png,"open',
    ]
    assert told(write(tmp_path, "\n".join(["image,text", *rows, "g.png,last\n"]))) == [
        (2, "", "a quote that is not closed"),
        (3, "plain", ""),
        (4, "quoted", ""),
        (5, "", "quotes do not match: ',' expected after '\"'"),
        (6, 'say "hi"', ""),
        (7, "", "a quote that is not closed"),
        (8, "last", ""),
    ]


def test_quotes_line_ends_and_marks_are_read_as_programs_write_them(tmp_path: Path) -> None:
    text = 'image,text\r\na.png,"say ""hi"",\nthere"\r\nb.png,\u2028 odd\x85line\r\n'
    for encoding in ("utf-8", "utf-8-sig"):
        assert told(write(tmp_path, text, encoding=encoding)) == [
            (2, 'say "hi",\nthere', ""), (4, "odd\x85line", ""),
        ]  # fmt: skip
    assert told(write(tmp_path, "image\ttext\na.png\tred, round\n", "t.tsv")) == [(2, "red, round", "")]


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("image,text\na.png,caf\u00e9\n", "latin-1", "line 2 is not UTF-8; save it as UTF-8"),
        ("image,text\na.png,x\n", "utf-16", "it is UTF-16; save it as UTF-8"),
        ("", "utf-8", "is empty"),
        ("\n\n", "utf-8", "is empty"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_in_a_line(
    text: str, encoding: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=message):
        read_csv(write(tmp_path, text, encoding=encoding))
    with pytest.raises(TableError, match="cannot read .*gone.csv: No such file"):
        read_csv(tmp_path / "gone.csv")


def test_a_missing_column_is_told_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no column image \(or path, .*; it has picture, text"):
        read_csv(write(tmp_path, "picture,text\na,b\n")).need("image")
    with pytest.raises(
        TableError, match="one column, 'image;text': its cells are separated by ';', not by commas"
    ):
        read_csv(write(tmp_path, "image;text\na;b\n")).need("image")


def test_a_cell_with_a_list_is_several_texts() -> None:
    assert texts_of('["a, b", "c"]') == texts_of("['a, b', 'c ']") == ["a, b", "c"]
    for cell in ("[a]", "[1, 2]", "[]", "a", "[" * 10_000 + "]" * 10_000):
        assert texts_of(cell) == [cell]
    assert texts_of("") == []


def test_pictures_in_the_one_folder_beside_a_table_are_found(tmp_path: Path) -> None:
    for name in ("Images", "masks", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "Images" / "a.jpg").write_bytes(b"x")
    (tmp_path / ".hidden" / "b.jpg").write_bytes(b"x")
    assert picture_folder(tmp_path, ["gone.jpg", "a.jpg"]) == tmp_path / "Images"
    assert picture_folder(tmp_path, ["b.jpg", "", "x" * 5000]) == tmp_path
    (tmp_path / "c.jpg").write_bytes(b"x")
    assert picture_folder(tmp_path, ["a.jpg", "c.jpg"]) == tmp_path


def test_a_public_table_is_audited_as_it_comes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "File,Age,Gender,Occupation,Cluster\na.png,20,Female,nurse,1\n,,,,\nb.png,30,M,,2\nc.png,,unknown,,\n",
    )
    assert [(i.input, i.gender, i.profession, i.cluster) for i in read_labels(path)] == [
        (tmp_path / "a.png", "woman", "nurse", "1"),
        (tmp_path / "b.png", "man", "", "2"),
        (tmp_path / "c.png", "", "", ""),
    ]
    captions = write(tmp_path, 'caption,sex\n"[""a cook"", ""one who cooks""]",f\n')
    assert [(item.input, item.gender) for item in read_labels(captions)] == [
        ("a cook", "woman"), ("one who cooks", "woman"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["text,gender\na nurse, smiling,woman\n", "gender,text\nwoman,a nurse, smiling\n"],
)
def test_an_audit_names_the_line_of_a_comma_or_leaves_the_row_out_where_it_may(
    text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text + ("plain,man\n" if text.startswith("text") else "man,plain\n"))
    with pytest.raises(monofacet.InputError, match="line 2: 3 cells for 2 columns"):
        read_labels(path)
    left_out: list[str] = []
    (item,) = read_labels(path, left_out)
    assert item.input == "plain"
    assert len(left_out) == 1 and "line 2" in left_out[0]


def test_pairs_of_the_command_line_are_read_by_the_same_names(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,caption,group\na.png,\"['one', 'two']\",x\n , ,\nb.png,,\n")
    assert _read_pairs(path) == [
        (tmp_path / "a.png", "one", "x"), (tmp_path / "a.png", "two", "x"), (tmp_path / "b.png", "", ""),
    ]  # fmt: skip
    with pytest.raises(monofacet.InputError, match="line 2: 4 cells for 2 columns"):
        _read_pairs(write(tmp_path, "image,text\na.png,a red circle, on white, drawn\n"))


def test_help_says_every_name() -> None:
    said = help_text(*COLUMNS)
    assert all(name in said for names in COLUMNS.values() for name in names)
    assert all(word in said for words in GENDERS.values() for word in words)
