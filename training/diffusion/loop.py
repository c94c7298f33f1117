"""The loop of a training: steps to the end, with progress, checkpoints and validation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Settings(Protocol):
    """How long a training is, and how many drawings a step takes."""

    steps: int
    batch: int


class Trainer(Protocol):
    """What is trained; `folder` is where its checkpoints and its log are."""

    settings: Settings
    folder: Path
    step: int

    def train_step(self) -> float:
        """Take one step and return its loss."""
        ...

    def validate(self) -> dict[str, Any]:
        """Return the metrics on drawings that are not trained on."""
        ...

    def save(self) -> None:
        """Write a checkpoint."""
        ...


def train_to_the_end(trainer: Trainer, validate_every: int, saved: Callable[[], None] | None = None) -> None:
    """Train until `trainer.settings.steps`; metrics go to ``log.jsonl`` in its folder.

    Parameters
    ----------
    trainer : Trainer
        At any step.
    validate_every : int
        Steps between checkpoints with their validations; there is one at the end, too.
    saved : callable, optional
        Called after each checkpoint.
    """
    started, first, settings = time.monotonic(), trainer.step, trainer.settings
    recent: list[float] = []
    while trainer.step < settings.steps:
        recent.append(trainer.train_step())
        done = trainer.step == settings.steps
        if trainer.step % 25 == 0 or done:
            pace = (time.monotonic() - started) / (trainer.step - first)
            print(
                f"step {trainer.step}/{settings.steps} loss {np.mean(recent[-100:]):.4f} "
                f"{settings.batch / pace:.0f} drawings/s, "
                f"{(settings.steps - trainer.step) * pace / 60:.0f} min left",
                flush=True,
            )
        if trainer.step % validate_every == 0 or done:
            trainer.save()
            minutes = (time.monotonic() - started) / 60
            metrics = {"step": trainer.step, "minutes": minutes, **trainer.validate()}
            with (trainer.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            print(metrics, flush=True)
            if saved is not None:
                saved()
