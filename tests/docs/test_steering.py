"""The tables of docs/steering.md are what was measured, and say where nothing was."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from benchmarks.steering_page import KEPT, PAGE, block, collect
from deployments.operations.settings import EMBEDDED_BUNDLE
from tests.support.tiny_attributes import make_attributes

FIGURE = {"value": 0.25, "low": -0.125, "high": 0.5}


def result() -> dict[str, Any]:
    groups = ("IMAGE", "low-level", "concept")
    both = {"semantic": FIGURE, "low-level": FIGURE}
    monotone = {name: {"monotone": 0.75, "median": 0.9} for name in both}
    return {
        "bundle": "b@1",
        "dictionary": "sae",
        "pairs": 3,
        "features_an_edit": 7.5,
        "strength_0_is_unsteered_byte_for_byte": True,
        "protocol": "is broken: what it says of labels does not count",
        "control": {**FIGURE, "p": 0.25},
        "effects": {"0.6": dict.fromkeys(groups, both)},
        "interaction": {"IMAGE against TEXT": {**FIGURE, "p": 0.5}},
        "interaction_dose": 0.6,
        "dose_response": dict.fromkeys(groups, monotone),
    }


def test_the_page_is_what_the_kept_figures_say() -> None:
    kept = json.loads(KEPT.read_text())
    assert block(kept) in PAGE.read_text(), "run `make figures`"
    assert collect(kept, EMBEDDED_BUNDLE, None) == kept, "run `make figures`"


def test_every_control_and_interval_is_in_the_tables() -> None:
    config = json.loads(json.dumps(asdict(make_attributes("f" * 64, 8).config)))
    config["evidence"]["left_out"] = {"line art": {"hit": 0.25, "kept": 1.0, "dose": 0.5}}
    text = block({"attributes": config, "steering": result()})
    assert "| blue | 24 | 75% [50%, 88%] | 0% [0%, 25%] |" in text
    assert "line art (hit 25%, kept 100%)" in text
    assert "| measure | none | IMAGE | low-level | concept |" in text
    assert "The protocol **is broken: what it says of labels does not count**" in text
    assert "| control: low-level against concept | +0.250 [-0.125, +0.500] | 0.2500 |" in text


def test_what_was_not_measured_is_said() -> None:
    text = block({"attributes": None})
    assert "no attributes yet" in text
    assert "was not run" in text
    assert "%" not in text
