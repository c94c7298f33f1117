"""A bundle is put in its place whole, and nothing that somebody else left beside it is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from services.bundle.load import Bundle
from services.errors import BundleFileError
from training.build.assemble import MARKER, NEW, OLD, in_place_of
from training.build.errors import BuildError


@pytest.fixture
def out(tiny: Bundle, tmp_path: Path) -> Path:
    """A bundle that is there already, with a file that the new one has not."""
    shutil.copytree(tiny.path, tmp_path / "mine")
    (tmp_path / "mine" / "of the old one").touch()
    return tmp_path / "mine"


def build(tiny: Bundle, out: Path) -> None:
    with in_place_of(out) as part:
        shutil.copytree(tiny.path, part, dirs_exist_ok=True)


def is_new(out: Path) -> bool:
    return not (out / "of the old one").exists() and Bundle.load(out).id.startswith("tiny")


def test_a_bundle_takes_the_old_ones_place_and_leaves_nothing_beside_it(tiny: Bundle, out: Path) -> None:
    build(tiny, out)
    assert is_new(out)
    assert list(out.parent.iterdir()) == [out]


def test_a_bundle_may_be_read_by_whoever_may_read_a_folder_made_there(out: Path) -> None:
    (out.parent / "other").mkdir()
    made = in_place_of(out)
    assert made.__enter__().stat().st_mode == (out.parent / "other").stat().st_mode


@pytest.mark.parametrize("name", ["mine.old", "mine.part", ".mine.backup", "mine.new"])
def test_what_lies_beside_a_bundle_is_left_alone(tiny: Bundle, out: Path, name: str) -> None:
    shutil.copytree(tiny.path, out.with_name(name))
    (out.with_name(name) / "thesis.txt").write_text("years of work")
    build(tiny, out)
    assert is_new(out)
    assert (out.with_name(name) / "thesis.txt").read_text() == "years of work"


def test_what_killed_runs_left_is_deleted_by_the_next(tiny: Bundle, out: Path) -> None:
    killed = [in_place_of(out) for _ in range(2)]
    first = killed[0].__enter__()
    (first / "half a bundle").write_bytes(bytes(1000))
    second = killed[1].__enter__()
    assert not first.parent.exists()
    assert not is_new(out)
    build(tiny, out)
    assert not second.parent.exists()
    assert list(out.parent.iterdir()) == [out]


def test_the_folder_of_a_bundle_with_a_longer_name_is_left_alone(tiny: Bundle, out: Path) -> None:
    other = in_place_of(out.with_name("mine.v2"))
    part = other.__enter__()
    build(tiny, out)
    assert part.is_dir()


def test_a_bundle_comes_back_where_a_run_was_killed_between_the_two_moves(tiny: Bundle, out: Path) -> None:
    ours = out.with_name(".mine.abcdefgh")
    shutil.copytree(tiny.path, ours / NEW)
    (ours / MARKER).write_text("mine")
    out.rename(ours / OLD)
    with pytest.raises(KeyboardInterrupt), in_place_of(out):
        raise KeyboardInterrupt
    assert (out / "of the old one").exists()
    assert list(out.parent.iterdir()) == [out]


def test_a_bundle_that_is_not_whole_does_not_take_the_place(tiny: Bundle, out: Path) -> None:
    with pytest.raises(BundleFileError, match="no manifest"), in_place_of(out) as part:
        (part / "half").touch()
    assert (out / "of the old one").exists()
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_that_came_meanwhile_and_is_no_bundle_is_not_replaced(tiny: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    with pytest.raises(BuildError, match="is not a bundle"), in_place_of(out) as part:
        shutil.copytree(tiny.path, part, dirs_exist_ok=True)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
