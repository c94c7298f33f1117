"""Which of several settings is chosen, and what is then written into the pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from services.bundle.manifest import DiffusionEntry
from services.imaging.pipeline import load_parts
from services.strict_json import parse_dataclass
from tests.services.imaging.conftest import Load, load_kind  # noqa: F401
from training.build.embedded_steps import steps
from training.diffusion.choose import (
    GUIDANCES,
    RECORD,
    SOLVERS,
    STEPS,
    Measured,
    Setting,
    choose,
    for_choosing,
    not_worse,
    pick,
    write_choice,
)

N = 200


def found(share: float, seed: int = 0) -> np.ndarray:
    """Return judgements of which `share` are right; those of a larger share contain those of a smaller one."""
    return np.random.default_rng(seed).permutation(N) < share * N


def test_a_setting_is_worse_only_where_its_paired_interval_says_so() -> None:
    assert not_worse([found(0.9), found(0.895), found(0.5)]).tolist() == [True, True, False]
    # As far apart as the third, but on other captions each: pairs tell no more than the means do.
    assert not_worse([found(0.52, 1), found(0.5, 2)]).all()


def test_of_equals_the_fewest_steps_or_the_least_distance_is_taken() -> None:
    stage = [
        Measured(Setting("dpm++", 8, 3.0), found(0.5), 10.0),
        Measured(Setting("dpm++", 12, 3.0), found(0.895), 30.0),
        Measured(Setting("dpm++", 16, 3.0), found(0.9), 20.0),
    ]
    assert pick(stage, fewest=True).steps == 12
    assert pick(stage, fewest=False).steps == 16


def test_guidance_then_solver_then_steps_are_chosen_each_with_what_came_before() -> None:
    asked: list[Setting] = []

    def measure(setting: Setting) -> Measured:
        asked.append(setting)
        share = 0.9 - 0.2 * (setting.guidance != 4.0) - 0.2 * (setting.solver != "unipc")
        return Measured(setting, found(share - 0.3 * (setting.steps < 10)), 50.0)

    chosen, table = choose(Setting("dpm++", 12, 3.0), measure)
    assert chosen == Setting("unipc", 10, 4.0)
    # Nothing is measured twice.
    assert len(asked) == len(set(asked)) == len(GUIDANCES) + len(SOLVERS) + len(STEPS) - 2
    for stage, count in (("guidance", len(GUIDANCES)), ("solver", len(SOLVERS)), ("steps", len(STEPS))):
        rows = [row for row in table if row["stage"] == stage]
        assert len(rows) == count
        assert sum(row["chosen"] for row in rows) == 1
    last = [row for row in table if row["chosen"]][-1]
    assert {k: last[k] for k in ("solver", "steps", "guidance")} == vars(chosen)
    assert last["judge"]["low"] <= last["judge"]["value"] <= last["judge"]["high"]


def test_half_of_the_captions_are_for_choosing_whatever_the_others_are() -> None:
    captions = np.array([f"caption {i}" for i in range(2000)])
    chosen = for_choosing(captions)
    # 4 standard deviations of a half over 2,000.
    assert chosen.mean() == pytest.approx(0.5, abs=0.045)
    assert (for_choosing(captions[::-1])[::-1] == chosen).all()


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_what_was_chosen_is_what_the_service_loads(load_kind: Load, tmp_path: Path, solver: str) -> None:  # noqa: F811
    import shutil

    bundle, _ = load_kind("unclip")
    folder = Path(shutil.copytree(bundle.path / "diffusion", tmp_path / "diffusion"))
    write_choice(folder, Setting(solver, 9, 2.5), {"captions": 3})
    entry = parse_dataclass(DiffusionEntry, json.loads((folder / "monofacet.json").read_text()), "diffusion")
    assert (entry.num_inference_steps, entry.guidance_scale) == (9, 2.5)
    parts = load_parts(folder, entry)
    assert type(parts.scheduler) is type(SOLVERS[solver]())
    assert parts.scheduler.config.prediction_type == "v_prediction"
    assert len(parts.new_scheduler(9).timesteps) == 9
    assert json.loads((folder / RECORD).read_text()) == {"captions": 3}


def test_the_recipe_of_the_bundle_chooses_after_it_exported_and_with_a_judge() -> None:
    arguments = argparse.Namespace(
        work=Path("work"), corpus=Path("corpus"), clip=Path("clip"), out=Path("out"), workers=1, seeds=1,
        views=1, fit_limit=0, effort=1.0, test=False,
    )  # fmt: skip
    names = [command[0] for command in steps(arguments)]
    places = [
        names.index(f"training.{name}") for name in ("diffusion.export", "judging.train", "diffusion.choose")
    ]
    assert places == sorted(places)
    assert names[-1] == "training.report.page"
