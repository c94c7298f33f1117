"""The steering protocol's statistics on changes whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.steering_statistics import Changes, dose_response, effects, interaction

NAMES = ("semantic", "low-level")


def changes(low: float, semantic: float, seed: int, count: int = 80) -> Changes:
    rng = np.random.default_rng(seed)
    size = {"semantic": semantic, "low-level": 10 * low}
    # Each measure has its own unit, as in the protocol.
    unit = {"semantic": 1.0, "low-level": 10.0}
    return {n: size[n] + unit[n] * rng.normal(size=count) for n in NAMES}


def test_interaction_is_found_where_one_group_acts_low_and_the_other_on_meaning() -> None:
    found = interaction(changes(2, 0, 0), changes(0, 2, 1), permutations=2000)
    assert found["p"] < 0.01
    assert found["value"] > 0
    assert found["low_level"] > 0 > found["semantic"]
    assert 0 < found["low"] < found["value"] < found["high"]


def test_interaction_is_not_found_where_one_group_is_only_stronger() -> None:
    assert interaction(changes(3, 3, 0), changes(1, 1, 1), permutations=2000)["p"] > 0.05


def test_interaction_of_equal_groups_is_significant_as_often_as_the_level_says() -> None:
    p = [interaction(changes(1, 1, s), changes(1, 1, 1000 + s), permutations=400)["p"] for s in range(200)]
    # 200 draws of a share of 0.05: 4 standard deviations are 0.06.
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.06)


def test_dose_response_counts_monotone_pairs() -> None:
    rising = np.arange(1, 5)[:, None] * np.ones(6)
    rising[:, 5] = [3, 1, 2, 0.5]
    found = {0.1 * (i + 1): {"semantic": row} for i, row in enumerate(rising)}
    assert dose_response(found)["semantic"]["monotone"] == pytest.approx(5 / 6)


def test_effects_are_means_with_intervals_around_them() -> None:
    result = effects({"IMAGE": changes(2, 0, 0)})["IMAGE"]["low-level"]
    assert result["low"] < result["value"] < result["high"]
    assert result["value"] == pytest.approx(20, abs=5)
