"""Memory stands still under calls that succeed and calls that fail; a server that leaks on purpose is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.memory import MOST_GROWTH, growth

ROUNDS, CALLS = 12, 50


def measured(kind: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.deployments.leaking", str(ROUNDS), str(CALLS), kind],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200, check=True,
    )  # fmt: skip
    samples: list[float] = json.loads(done.stdout.splitlines()[-1])
    return samples


def test_memory_stands_still() -> None:
    assert growth(measured("sound")) <= MOST_GROWTH


def test_a_server_that_keeps_every_request_is_found_out() -> None:
    # 300 kB of each of 2 x 50 calls a round: 30 MB a round, 120 MB between the medians, on less than 1 GB.
    assert growth(measured("leaky")) > MOST_GROWTH


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([100.0] * 12, 0.0),
        # What fills up in the first third is no leak.
        ([10, 30, 60, 90, *[100.0] * 8], 0.0),
        ([100.0 + 2 * n for n in range(12)], 0.0714),
    ],
)
def test_growth_is_that_of_the_medians_after_warm_up(samples: list[float], expected: float) -> None:
    assert growth(samples) == pytest.approx(expected, abs=0.01)


def test_too_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="say nothing"):
        growth([1.0] * 8)
