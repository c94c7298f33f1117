"""The steering protocol's measures and its pairs for a reader, on pictures whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import steering_pairs
from benchmarks.steering import Directions, SteeringPair, descriptors, measure, within
from services.imaging.edits import AttributeEdit, Edit, SetQuantile, Steering


def square(colour: tuple[int, int, int], side: int = 16) -> np.ndarray:
    picture = np.full((1, 32, 32, 3), 255, np.uint8)
    picture[:, 8 : 8 + side, 8 : 8 + side] = colour
    return picture


def test_descriptors_tell_colour_ink_and_edges_apart() -> None:
    red, blue, small = (
        descriptors(p)[0] for p in (square((200, 0, 0)), square((0, 0, 200)), square((200, 0, 0), 8))
    )
    assert red[1] > 40
    assert blue[2] < -40 < red[2]
    np.testing.assert_allclose(red[:6], small[:6], atol=1e-9)
    assert (red[6], small[6]) == (0.25, 0.0625)
    assert np.abs(descriptors(np.full((1, 8, 8, 3), 255, np.uint8))).sum() == 0


def test_within_leaves_nothing_of_the_means_of_groups() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, 200)
    noise = rng.standard_normal((200, 3))
    centred = within(noise + 100 * group[:, None], group)
    np.testing.assert_allclose(centred, within(noise, group), atol=1e-9)


class Colours:
    """A judge to whom a caption is a lightness, and a picture its own."""

    def images(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.mean((1, 2, 3))[:, None] / 255

    def texts(self, captions: list[str]) -> np.ndarray:
        return np.array([[float(c)] for c in captions])


def directions() -> Directions:
    made = object.__new__(Directions)
    made.mean, made.std = np.zeros(8), np.ones(8)
    return made


def measured(made: np.ndarray) -> dict[str, np.ndarray]:
    base, reference = square((200, 0, 0)), square((0, 0, 100))
    corpus: Any = SimpleNamespace(plain=np.concatenate([base, reference]))
    pair = SteeringPair(0, 1, "1", "0", {})
    judge: Any = Colours()
    return measure(judge, directions(), corpus, base, made, [pair])


def test_measures_are_signed_shares_of_the_way_to_the_reference() -> None:
    assert {k: v.tolist() for k, v in measured(square((200, 0, 0))).items()} == {
        "semantic": [0.0],
        "low-level": [0.0],
    }
    there = measured(square((0, 0, 100)))
    assert there["semantic"][0] == pytest.approx(1.0)
    assert there["low-level"][0] == pytest.approx(1.0)
    away = measured(square((250, 120, 0)))
    assert away["semantic"][0] < 0
    assert away["low-level"][0] < 0


def test_the_judge_is_shown_no_colour() -> None:
    # Another hue of one luma: all of it is low-level.
    green = round(200 * 0.2126 / 0.7152)
    found = measured(square((0, green, 0)))
    assert abs(found["semantic"][0]) < 0.05
    assert abs(found["low-level"][0]) > 0.1


def test_the_key_names_the_side_of_the_steered_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [
        steering_pairs.Shown("a cat", Steering(attributes=(AttributeEdit("blue"),)), "blue")
        if i % 2
        else steering_pairs.Shown("a cat", Steering((Edit((1,), SetQuantile(0.95)),)), "page")
        for i in range(steering_pairs.PAIRS)
    ]

    def draw(imaging: Any, requests: list[Any], side: int) -> np.ndarray:
        return np.stack(
            [np.full((side, side, 3), 0 if request.steering else 255, np.uint8) for request in requests]
        )

    monkeypatch.setattr(steering_pairs, "chosen_pairs", lambda *_: shown)
    monkeypatch.setattr(steering_pairs, "draw", draw)
    imaging: Any = SimpleNamespace(entry=SimpleNamespace(height=32))
    unused: Any = None
    told = steering_pairs.reader_pairs(imaging, unused, unused, unused, tmp_path, seed=3)
    assert told == {"pairs": 16, "by_features": 8}
    key = json.loads((tmp_path / "key.json").read_text())
    assert {one["steered"] for one in key} == {"left", "right"}
    for one in key:
        pixels = np.asarray(Image.open(tmp_path / f"{one['pair']:02d}.png"))[steering_pairs.MARGIN + 4 : -16]
        dark = np.argmin([half.mean() for half in np.array_split(pixels, 2, axis=1)])
        assert one["steered"] == ("left", "right")[dark]
    assert (tmp_path / "sheet.png").exists()
