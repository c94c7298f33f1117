"""A pipeline without weights: counts its steps, and stops before each one while a test holds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.generator.events import GenerateTask, Size
from services.errors import GenerationFailed, InvalidInput, MonofacetError
from tests.support.waiting import PATIENCE_S


@dataclass(eq=False)
class DebugSample:
    """An image whose pixels tell its seed and how often it was stepped."""

    prompt: str
    seed: int
    steps: int
    shape: tuple[int, ...]
    index: int = 0
    preview: bool = False
    error: MonofacetError | None = None

    @property
    def done(self) -> bool:
        return self.index >= self.steps or self.error is not None


class DebugPipeline:
    """Prompts say what happens: "bad" is refused, "crash" breaks its step, "explode" breaks the whole step,
    "blind" breaks its preview, "lost" its decoding."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.prepared: list[str] = []
        self._held = False
        self._permits = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.bytes = 1

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        self._permits.release()

    def let_one_step(self) -> None:
        """Wait until a step has begun, and let that one alone go on."""
        assert self.entered.acquire(timeout=PATIENCE_S)
        before = self.calls
        self._permits.release()
        while self.calls == before:
            time.sleep(0.001)

    @property
    def calls(self) -> int:
        return len(self.batches)

    def steps_of(self, prompt: str) -> int:
        return sum(batch.count(prompt) for batch in self.batches)

    def prepare(self, task: GenerateTask) -> tuple[list[DebugSample], list[Size]]:
        request = task.request
        self.prepared.append(request.prompt)
        if request.prompt == "bad":
            raise InvalidInput("a bad prompt", [("prompt", "a bad prompt")])
        if request.prompt == "surprise":
            raise ZeroDivisionError("/secret/path")
        shape = (4, (request.height or 64) // 8, (request.width or 64) // 8)
        twins = [request.prompt] + ["twin"] * task.unsteered
        samples = [
            DebugSample(prompt, seed, request.num_inference_steps or 4, shape)
            for prompt in twins
            for seed in task.seeds
        ]
        return samples, [Size(0.5 if sample.prompt != "twin" else 0.0) for sample in samples]

    def step(self, samples: Sequence[Any]) -> None:
        self.entered.release()
        if self._held and not self._permits.acquire(timeout=PATIENCE_S):
            raise TimeoutError("the test never released the model")
        if any(sample.prompt == "explode" for sample in samples):
            self.batches.append([sample.prompt for sample in samples])
            raise RuntimeError("/secret/path")
        for sample in samples:
            sample.index += 1
            if sample.prompt == "crash" and sample.index == 2:
                sample.error = GenerationFailed("a step of this image failed")
        self.batches.append([sample.prompt for sample in samples])

    def decode(self, sample: DebugSample) -> NDArray[np.uint8]:
        if sample.error is not None:
            raise sample.error
        if sample.prompt == "lost":
            raise ZeroDivisionError("/secret/path")
        return np.full((8, 8, 3), sample.seed % 256, np.uint8)

    def preview(self, sample: DebugSample) -> NDArray[np.uint8]:
        if sample.prompt == "blind":
            raise RuntimeError("/secret/path")
        return np.full((1, 1, 3), sample.index, np.uint8)

    def bytes_of(self, sample: DebugSample) -> int:
        return self.bytes
