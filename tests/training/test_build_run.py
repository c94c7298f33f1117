"""Which pictures a build takes for its pairs, and what it does where somebody insists on a calibration."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from services.bundle.load import CLIP_CONFIG, CLIP_WEIGHTS, Bundle
from services.bundle.manifest import NAME
from training.build.bad_rows import check_bad_share
from training.build.embed import embed, fitting, only_readable, read_images, store_key
from training.build.errors import BuildError
from training.build.progress import Reporter
from training.build.run import Build
from training.build.selection import Selection
from training.build.settings import BuildSettings
from training.build.store import ShardEntry, Store
from training.build.studies import Skipped
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

NAMES = ("a.png", "b.png", "c.png", "d.png")


def table(folder: Path, names: tuple[str, ...], file: str = "pairs.csv") -> tuple[Path, ...]:
    """Write a table whose images are their own names, and return it as `--pairs`."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    lines = ["path,caption", *(f"{name},{name}" for name in names)]
    (folder / file).write_text("\n".join(lines) + "\n")
    return (folder / file,)


@pytest.fixture
def settings(tiny: Bundle, tmp_path: Path) -> BuildSettings:
    """Of a build from embeddings of four pairs, with the towers fetched."""
    clip = tmp_path / "work" / "clip"
    clip.mkdir(parents=True)
    shutil.copyfile(tiny.path / CLIP_CONFIG, clip / CONFIG_FILE)
    shutil.copyfile(tiny.path / CLIP_WEIGHTS, clip / WEIGHTS_FILE)
    store = Store(tmp_path / "store", store_key(clip, ("{}",), "float16", "cpu"))
    size = len(NAMES), store.key.embed_dim
    empty = dict.fromkeys(("gender", "profession", "label", "group", "split"), [""] * len(NAMES))
    columns = empty | {
        "source": ["pairs.csv"] * len(NAMES), "row": range(len(NAMES)), "key": NAMES, "caption": NAMES,
        "image_norm": [1.0] * len(NAMES),
    }  # fmt: skip
    store.write(ShardEntry("000-000000", "d", len(NAMES), []), np.ones(size), np.ones((1, *size)), columns)
    store.finish(["000-000000"])
    return BuildSettings(
        out=tmp_path / "out", work=tmp_path / "work", model="m", embeddings=tmp_path / "store"
    )


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def reporter(said: io.StringIO) -> Reporter:
    return Reporter(Console(file=said, width=300))


def selected() -> Selection:
    source = np.full(len(NAMES), "pairs.csv", dtype=object)
    columns = {"source": source, "row": np.arange(len(NAMES)), "key": np.array(NAMES, dtype=object)}
    return Selection(None, {**columns, "set": source}, {})  # type: ignore[arg-type]


def pictures(paths: tuple[Path, ...], settings: BuildSettings) -> list[str | None]:
    """Return which image each pair gets."""
    columns = only_readable(selected(), replace(settings, pairs=paths))[0].columns
    places = [(columns["source"][i], int(columns["row"][i])) for i in range(len(NAMES))]
    found = read_images(paths, places)
    return [found[place].decode() if place in found else None for place in places]


def test_pairs_that_were_embedded_are_taken_as_they_are(
    settings: BuildSettings, reporter: Reporter, said: io.StringIO, tmp_path: Path
) -> None:
    paths = table(tmp_path / "pairs", NAMES)
    assert pictures(paths, settings) == list(NAMES)
    embed(replace(settings, pairs=paths), reporter)
    assert said.getvalue() == ""
    selection = selected()
    assert only_readable(selection, replace(settings, pairs=paths)) == (selection, True)
    assert only_readable(selection, settings) == (selection, False)


def test_rows_that_were_sorted_anew_get_no_other_pairs_picture(
    settings: BuildSettings, reporter: Reporter, said: io.StringIO, tmp_path: Path
) -> None:
    paths = table(tmp_path / "pairs", ("a.png", "c.png", "b.png"))
    assert pictures(paths, settings) == ["a.png", None, None, None]
    embed(replace(settings, pairs=paths), reporter)
    assert "3 of 4 pairs" in said.getvalue()


def test_stages_that_read_pictures_run_again_when_other_pairs_have_them(
    settings: BuildSettings, tmp_path: Path
) -> None:
    found = {
        only_readable(selected(), replace(settings, pairs=table(tmp_path / str(number), names)))[1]
        for number, names in enumerate([NAMES, NAMES[:2], NAMES[:3], ("z.png", *NAMES[1:])])
    }
    assert len(found) == 4
    assert True in found


@pytest.mark.parametrize(
    ("names", "file"),
    [(NAMES, "renamed.csv"), (("z.png", *NAMES[:3]), "pairs.csv")],
    ids=["renamed", "shifted"],
)
def test_embeddings_of_other_pairs_are_refused_before_anything_is_trained(
    settings: BuildSettings, reporter: Reporter, tmp_path: Path, names: tuple[str, ...], file: str
) -> None:
    paths = table(tmp_path / "pairs", names, file)
    with pytest.raises(BuildError, match="was not made from these --pairs"):
        embed(replace(settings, pairs=paths), reporter)


def test_a_picture_of_a_source_that_is_gone_or_shorter_is_left_out(tmp_path: Path) -> None:
    paths = table(tmp_path / "pairs", NAMES[:1])
    assert read_images(paths, [("gone.csv", 0), ("pairs.csv", 5), ("pairs.csv", 0)]) == {
        ("pairs.csv", 0): b"a.png"
    }
    columns = {"source": ["gone.csv", "pairs.csv", "pairs.csv"], "row": [0, 5, 0], "key": ["a.png"] * 3}
    assert fitting(paths, columns).tolist() == [False, False, True]


Make = Callable[[Callable[[float], None]], tuple[list[Path], dict[str, Any]]]


def study(settings: BuildSettings, reporter: Reporter, wanted: bool | None, make: Make) -> list[str]:
    """Run one calibration as a run of its own, and return what it notes as left out."""
    build = Build(settings, reporter)
    build._study("bias", "Gender bias", wanted, {"pairs": "the same"}, 1, make)
    return build.skips


def test_who_insists_is_told_why_a_calibration_was_skipped_on_every_run(
    settings: BuildSettings, reporter: Reporter
) -> None:
    runs = []

    def few(tell: Callable[[float], None]) -> tuple[list[Path], dict[str, Any]]:
        runs.append(1)
        raise Skipped("3 pairs are of a woman")

    for _ in range(2):
        assert study(settings, reporter, None, few) == ["Gender bias: 3 pairs are of a woman."]
    assert len(runs) == 1
    for _ in range(2):
        with pytest.raises(BuildError, match="Gender bias: 3 pairs are of a woman"):
            study(settings, reporter, True, few)
    assert study(settings, reporter, None, few) == ["Gender bias: 3 pairs are of a woman."]


def test_who_insists_has_a_skipped_calibration_tried_again(
    settings: BuildSettings, reporter: Reporter
) -> None:
    def unreadable(tell: Callable[[float], None]) -> tuple[list[Path], dict[str, Any]]:
        raise Skipped("the images cannot be read again")

    def good(tell: Callable[[float], None]) -> tuple[list[Path], dict[str, Any]]:
        return [], {"figure": 1}

    assert study(settings, reporter, None, unreadable)
    assert study(settings, reporter, True, good) == []
    assert (settings.work / "bias.json").exists()
    # And what is done is not done again.
    assert study(settings, reporter, True, unreadable) == []


def bad(count: int) -> list[list[Any]]:
    return [["t.csv", i, "", "no caption" if i else "no image"] for i in range(count)]


def test_a_build_ends_where_more_rows_are_bad_than_may_be(settings: BuildSettings) -> None:
    # 10% of the rows, and one more.
    check_bad_share(bad(3), 27, settings)
    with pytest.raises(
        BuildError, match=r"4 of 30 rows cannot be used, 13\.3%, and --max-bad-share is 10\.0%"
    ) as e:
        check_bad_share(bad(4), 26, settings)
    assert "bad_rows.csv says why; most often: no caption" in str(e.value)
    check_bad_share(bad(4), 26, replace(settings, max_bad_share=0.2))
    with pytest.raises(BuildError, match="no row of the pairs can be used"):
        check_bad_share(bad(2), 0, replace(settings, max_bad_share=1.0))


def commas(folder: Path, good: int, broken: int) -> tuple[Path, ...]:
    """Write a table with captions whose commas are not quoted, and pictures."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    rows = [f"{i}.png,{'red' if i < good else 'red, round'}" for i in range(good + broken)]
    for i in range(good + broken):
        (folder / f"{i}.png").write_bytes(picture.getvalue())
    (folder / "t.csv").write_text("\n".join(["path,caption", *rows]))
    return (folder / "t.csv",)


def test_a_table_with_too_many_bad_rows_is_refused_before_anything_is_embedded(
    settings: BuildSettings, reporter: Reporter, said: io.StringIO, tmp_path: Path
) -> None:
    pairs = replace(settings, embeddings=None, pairs=commas(tmp_path / "many", 8, 2))
    with pytest.raises(
        BuildError, match=r"2 of 10 rows cannot be used, 20\.0%.*a text with a comma must stand"
    ):
        embed(pairs, reporter)
    assert not (settings.work / "embeddings").exists()
    assert (settings.work / "bad_rows.csv").read_text().count("a text with a comma must stand in quotes") == 2
    store = embed(replace(pairs, max_bad_share=0.2), reporter)
    assert [entry.rows for entry in store.shards()] == [8]
    assert "2 of 10 rows were skipped (20.0%, at most 20.0% may be)" in said.getvalue()
    assert (settings.work / "bad_rows.csv").read_text().count("\n") == 3


def test_a_bundle_is_called_as_its_folder_is_as_far_as_a_name_may(settings: BuildSettings) -> None:
    names = {
        "emoji": "emoji",
        "Mes images é 😀 [1]": "Mes images é - -1-",
        ".hidden": "hidden",
        "😀": "bundle",
    }
    for folder, name in names.items():
        made = replace(settings, out=Path(folder)).bundle_name
        assert (made, NAME.fullmatch(made) is not None) == (name, True)
    assert replace(settings, name="mine").bundle_name == "mine"
