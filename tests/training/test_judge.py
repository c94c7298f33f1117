"""The judge's choice among captions and its training, on made-up inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.judging.train import (
    POOLED,
    SENTENCE,
    THUMBNAIL,
    JudgeSettings,
    blur,
    metrics,
    pick_among,
    train,
)

INPUTS = POOLED + 3 * THUMBNAIL**2
SMALL = JudgeSettings(steps=60, batch=32, dim=16, hidden=32, dropout=0.0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_right_captions_are_found_always_and_random_ones_at_chance() -> None:
    rng = np.random.default_rng(0)
    texts = unit(rng.normal(size=(200, 64)))
    right = rng.integers(0, 200, 2000)
    assert pick_among(texts[right], texts, right, 20).mean() == 1.0
    chance = pick_among(unit(rng.normal(size=(2000, 64))), texts, right, 20).mean()
    # 4 standard deviations of 1/20 over 2,000.
    assert chance == pytest.approx(0.05, abs=0.02)


def test_judge_learns_which_inputs_go_with_which_words() -> None:
    rng = np.random.default_rng(1)
    names = np.array([f"{colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "sun")])
    centres = rng.normal(size=(6, INPUTS)).astype(np.float32)
    sentences = rng.normal(size=(6, SENTENCE)).astype(np.float32)
    order = np.argsort(names)
    inputs, captions = {"captions": names[order], "sentences": sentences[order]}, {}
    for part, count in (("train", 120), ("soft", 60), ("validation", 30), ("test", 30)):
        which = rng.integers(0, 6, count)
        inputs[f"{part}_images"] = centres[which] + 0.3 * rng.normal(size=(count, INPUTS)).astype(np.float32)
        captions[part] = names[which]
    found = metrics(train(inputs, captions, SMALL), inputs, captions)
    assert found["validation"]["r1"]["value"] > 0.9
    assert found["test"]["r1"]["value"] > 0.9


def test_blur_removes_detail_and_keeps_the_mean() -> None:
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    soft = blur(noise, torch.Generator().manual_seed(1))
    assert soft.std() < 0.7 * noise.std()
    assert soft.mean() == pytest.approx(float(noise.mean()), abs=0.01)
