"""The peers get the same model, and are compared as the report says."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.ceilings import image_flops
from benchmarks.peers.__main__ import choose
from benchmarks.peers.measure import SCENARIOS
from benchmarks.peers.report import plot, summary, table
from benchmarks.peers.servers import Contender
from benchmarks.peers.weights import TOLERANCE, difference, transformers_state, write_transformers
from services.bundle.load import Bundle


def test_the_layout_of_transformers_holds_the_same_model(tiny: Bundle, tmp_path: Path) -> None:
    assert difference(tiny, write_transformers(tiny, tmp_path / "converted")) <= TOLERANCE


def test_a_tensor_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="visual.surprise"):
        transformers_state({"visual.surprise": None})  # type: ignore[dict-item]


def test_a_forward_of_vit_b_32_takes_what_is_published() -> None:
    vision = {"width": 768, "layers": 12, "patch_size": 32}
    config = SimpleNamespace(model_cfg={"vision_cfg": vision}, image_size=(224, 224), embed_dim=512)
    # 4.4 G multiply-adds, as open_clip's own table of models has it.
    assert image_flops(config) / 2 == pytest.approx(4.4e9, rel=0.01)


def run(rate: float, p50: float, cpu: float = 100.0) -> dict[str, Any]:
    load = {"images_per_s": rate, "latencies": [p50, p50, 9.0], "cpu_ms_per_image": cpu}
    return {scenario.name: load for scenario in SCENARIOS}


def test_ratios_are_taken_within_a_round_against_that_rounds_best_peer() -> None:
    visits = {
        "monofacet (defaults)": [run(10, 0.1), run(4, 0.3, 200)],
        "litserve (a)": [run(5, 0.2), run(1, 0.4)],
        "fastapi (b)": [run(4, 0.05), run(2, 0.6)],
    }
    found = summary(visits, SCENARIOS)["32x1"]["over the best peer"]
    assert found["throughput"] == pytest.approx(2.0)
    assert found["p50"] == pytest.approx((0.1 / 0.05 + 0.3 / 0.4) / 2)
    assert found["images_per_cpu_second"] == pytest.approx((1.0 + 0.5) / 2)


def test_a_peer_runs_with_the_settings_that_were_faster() -> None:
    slow, fast = Contender("litserve", "slow", "json"), Contender("litserve", "fast", "json")
    ours = Contender("monofacet", "defaults", "monofacet")
    tried = {slow.name: [run(1, 1)], fast.name: [run(2, 1)]}
    assert choose([ours, slow, fast], tried) == [ours, fast]


def test_the_report_shows_every_server_and_which_goals_are_missed(tmp_path: Path) -> None:
    visits = {"monofacet (defaults)": [run(10, 0.1)], "litserve (a)": [run(8, 0.2)]}
    report = {
        "machine": {"processor": "a processor", "cores": 2, "load": 0.0},
        "ceiling": {"images_per_s": 12.0},
        "results": summary(visits, SCENARIOS),
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(report))
    lines = console.export_text().splitlines()
    assert sum("litserve (a)" in line for line in lines) == len(SCENARIOS)
    assert any("1x1" in line and "p50 <= 1: yes" in line for line in lines)
    # 10 images/s are 1.25 times 8, and 1.8 times is the goal.
    assert sum("x 1.25" in line and "throughput >= 1.8: NO" in line for line in lines) == 2
    plot(report, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes()[:4] == b"\x89PNG"
