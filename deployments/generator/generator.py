"""The generator: a bundle's pipeline behind the engine, as a stream of events for each call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.batching import DeadlineExpired
from deployments.generator.engine import Engine, GenerationModel
from deployments.generator.events import Event, Events, Failed, Finished, GenerateTask, GeneratorInfo, Size
from deployments.operations.pulse import Activity
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.encoding.texts import TextLimits
from services.imaging.denoiser import Sample
from services.imaging.edits import ImageRequest, Steering
from services.imaging.generator import Imaging


class PipelineModel:
    """A bundle's pipeline; implements `deployments.generator.engine.GenerationModel`.

    Parameters
    ----------
    bundle
        Already verified.
    settings
        Threads and limits.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self._threads = settings.generator_threads or settings.threads
        self.imaging = Imaging.load(
            bundle,
            threads=self._threads,
            image_limits=settings.image_limits,
            text_limits=TextLimits(settings.max_text_bytes),
            # The command verified what the bundle holds; weights elsewhere it has not seen.
            verify=True,
            max_batch=settings.max_batch_images,
        )
        # A first image, from prompt to picture and preview, so that no caller pays for a first time.
        sample = self.imaging.prepare(ImageRequest(num_inference_steps=1))
        self.imaging.step([sample])
        self.imaging.decode(sample)
        self.imaging.preview(sample)
        self._bytes_per_image = self.imaging.bytes_per_image()
        self._pixels = self.imaging.entry.height * self.imaging.entry.width

    def prepare(self, task: GenerateTask) -> tuple[list[Sample], list[Size]]:
        """Return the samples of a call, steered images first, then unsteered, and the size of each one's steering."""
        requests = [task.request]
        if task.unsteered:
            requests.append(replace(task.request, steering=Steering()))
        samples, sizes = [], []
        for request in requests:
            conditioning = self.imaging.condition(request)
            for seed in task.seeds:
                samples.append(self.imaging.start(conditioning, replace(request, seed=seed)))
                sizes.append(Size(conditioning.delta, self.imaging.dose(conditioning)))
        return samples, sizes

    def step(self, samples: Sequence[Sample]) -> None:
        """Take samples of one shape a step further."""
        self.imaging.step(samples)

    def decode(self, sample: Sample) -> NDArray[np.uint8]:
        """Return the picture of a finished sample."""
        return self.imaging.decode(sample)

    def preview(self, sample: Sample) -> NDArray[np.uint8]:
        """Return a rough picture."""
        return self.imaging.preview(sample)

    def bytes_of(self, sample: Sample) -> int:
        """Estimate the memory of a sample in a step, from its size and whether it has guidance."""
        height, width = sample.shape[-2:]
        pixels = height * width * self.imaging.parts.pixels_per_latent**2
        return int(self._bytes_per_image * pixels / self._pixels * sample.rows / 2)

    def info(self) -> GeneratorInfo:
        """Describe what it runs on."""
        imaging = self.imaging
        own = imaging.entry.conditioning
        return GeneratorInfo(
            device=str(imaging.parts.device),
            precision="fp32" if imaging.parts.device.type == "cpu" else "fp16",
            threads=self._threads,
            paths=tuple(sorted(imaging.paths, key=lambda path: path != own)),
            takes_image=imaging.takes_image,
            batching=imaging.batching,
            bytes_per_image=self._bytes_per_image,
        )


class Generator:
    """Answers calls; one per replica.

    Parameters
    ----------
    settings
        Budgets.
    model
        The pipeline.
    """

    def __init__(self, settings: Settings, model: GenerationModel) -> None:
        self._engine = Engine(
            model,
            max_batch=settings.max_batch_images,
            max_queued=settings.max_queued_images,
            max_bytes=settings.generation_bytes,
        )

    async def generate(self, task: GenerateTask, remaining_s: float | None = None) -> AsyncIterator[Events]:
        """Make the images of a call; leaving the iteration stops them within a step.

        Parameters
        ----------
        task
            What to make.
        remaining_s
            Seconds until the caller's deadline; None for none.

        Raises
        ------
        QueueFull
            At once, when the images cannot wait.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            # Raised where the loop is closed: then no caller is left.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, event)

        end = None if remaining_s is None else loop.time() + remaining_s
        job = self._engine.submit(task, emit, remaining_s)
        left = task.images
        try:
            while left:
                events = [await _next(queue, None if end is None else end - loop.time())]
                while not queue.empty():
                    events.append(queue.get_nowait())
                left -= sum(isinstance(event, Finished) for event in events)
                if any(isinstance(event, Failed) for event in events):
                    left = 0
                yield Events(tuple(events), self._engine.take_records())
        finally:
            self._engine.cancel(job)

    @property
    def activity(self) -> Activity:
        """What its threads are at."""
        return self._engine.activity

    def check_health(self) -> None:
        """See `Engine.check_health`."""
        self._engine.check_health()

    async def close(self) -> None:
        """Finish the calls that are there."""
        await asyncio.to_thread(self._engine.close)


async def _next(queue: asyncio.Queue[Any], left_s: float | None) -> Any:
    try:
        async with asyncio.timeout(left_s):
            return await queue.get()
    except TimeoutError:
        return Failed(DeadlineExpired())
