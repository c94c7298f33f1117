"""The README's figures are those of the bundle and of the benchmarks that were run last."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from benchmarks.readme import BEGIN, ELSEWHERE, END, KEPT, README, ROOT, Row, block, collect, put_into, rows
from deployments.operations.settings import EMBEDDED_BUNDLE

VALUES = json.loads(KEPT.read_text())
STALE = "run `make figures`"


def test_the_table_is_what_the_kept_figures_say() -> None:
    page = README.read_text()
    assert block(VALUES) in page, STALE
    assert put_into(page, VALUES) == page


def test_the_kept_figures_are_those_of_the_embedded_bundle() -> None:
    assert collect(VALUES, EMBEDDED_BUNDLE, None, None) == VALUES, STALE


INTERVAL = re.compile(r"\[[+-]?[\d.]+, [+-]?[\d.]+\]")
SOURCE = re.compile(r"`(?:make (?P<target>\w+)|python -m (?P<module>[\w.]+)(?: --\w+)*)`")
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def amiss(row: Row) -> str:
    """Return what a figure lacks: an interval, something beside it, or a command that measures it."""
    if not INTERVAL.search(row.figure):
        return "no interval"
    if not re.search(r"\d", row.beside):
        return "nothing beside it"
    source = SOURCE.fullmatch(row.source)
    if source is None or not (
        source["target"] in TARGETS or (source["module"] and find_spec(source["module"]))
    ):
        return "no source"
    return ""


def shown() -> list[Row]:
    """Read the rows of the README's table."""
    table = README.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["what", "figure", "beside it", "measured by"]
    return [Row(*line) for line in lines[2:]]


def test_every_figure_of_the_readme_has_an_interval_something_beside_it_and_a_source() -> None:
    assert len(shown()) >= 8
    assert {row.what: amiss(row) for row in shown()} == {row.what: "" for row in shown()}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (Row("recall", "65%", "pixels 37%", "`make bundle`"), "no interval"),
        (Row("recall", "65% [62, 68]", "", "`make bundle`"), "nothing beside it"),
        (Row("recall", "65% [62, 68]", "a baseline", "`make bundle`"), "nothing beside it"),
        (Row("recall", "65% [62, 68]", "pixels 37%", "by hand"), "no source"),
        (Row("recall", "65% [62, 68]", "pixels 37%", "`make nothing`"), "no source"),
        (Row("recall", "65% [62, 68]", "pixels 37%", "`python -m benchmarks.nothing`"), "no source"),
        (Row("recall", "65% [62, 68]", "pixels 37%", "`python -m benchmarks.generation`"), ""),
        (Row("skew", "-0.10 [-0.20, +0.05]", "p 0.001", "`python -m training.bias.run --test`"), ""),
    ],
)
def test_a_figure_that_lacks_something_is_found(row: Row, what: str) -> None:
    assert amiss(row) == what


def test_a_row_whose_figures_are_missing_is_left_out() -> None:
    some = {name: value for name, value in VALUES.items() if name != "following"}
    assert len(rows(some)) == len(rows(VALUES)) - 1


def test_figures_of_a_benchmark_that_was_not_run_stay() -> None:
    assert collect({**VALUES, "following_unet": "x"}, EMBEDDED_BUNDLE, None, None)["following_unet"] == "x"


def test_a_figure_of_another_bundle_is_marked_and_explained() -> None:
    here = {**VALUES, "following_unet": VALUES["unet"]}
    assert ELSEWHERE not in block(here)
    other = {**here, "following_unet": "of another one"}
    assert len([row for row in rows(other) if ELSEWHERE in row.figure]) == 1
    assert block(other).count(ELSEWHERE) == 2
