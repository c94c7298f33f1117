"""The README's figures are those of the bundle and of the benchmarks that were run last."""

from __future__ import annotations

import json

from benchmarks.readme import ELSEWHERE, KEPT, README, block, collect, put_into, rows
from deployments.settings import EMBEDDED_BUNDLE

VALUES = json.loads(KEPT.read_text())
STALE = "run `make figures`"


def test_the_table_is_what_the_kept_figures_say() -> None:
    page = README.read_text()
    assert block(VALUES) in page, STALE
    assert put_into(page, VALUES) == page


def test_the_kept_figures_are_those_of_the_embedded_bundle() -> None:
    assert collect(VALUES, EMBEDDED_BUNDLE, None, None) == VALUES, STALE


def test_a_row_whose_figures_are_missing_is_left_out() -> None:
    some = {name: value for name, value in VALUES.items() if name != "following"}
    assert len(rows(some)) == len(rows(VALUES)) - 1


def test_figures_of_a_benchmark_that_was_not_run_stay() -> None:
    assert collect({**VALUES, "start_s": 7.5}, EMBEDDED_BUNDLE, None, None)["start_s"] == 7.5


def test_a_figure_of_another_bundle_is_marked_and_explained() -> None:
    names = ("following_unet", "start_bundle", "stopping_bundle")
    here = {**VALUES, **dict.fromkeys(names, VALUES["bundle"]), "following_unet": VALUES["unet"]}
    assert ELSEWHERE not in block(here)
    for name in names:
        marked = [what for what, figure, _ in rows({**here, name: "emoji@other"}) if ELSEWHERE in figure]
        assert len(marked) == 1
        assert block({**here, name: "emoji@other"}).count(ELSEWHERE) == 2
