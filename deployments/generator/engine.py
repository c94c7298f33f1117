"""The generation engine: denoising steps in a thread of their own, over whatever images are there.

Continuous batching: after each step, finished images leave and waiting ones join, so a call waits for a place
and never for another call's end. A place goes to the caller who has had least. Between two steps, and at no other
time, images whose caller has gone or whose deadline has passed are dropped; so a cancellation costs at most one step.
Encoding prompts and decoding pictures happen in another thread, beside the steps of others.

Both threads catch BaseException, since a panic of a Rust library (tokenizers, safetensors) is no Exception.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deployments.batching import BatcherClosed, BatchRecord, DeadlineExpired, QueueFull
from deployments.generator.events import Event, Failed, Finished, GenerateTask, Preview, Progress, Size
from deployments.operations.pulse import Activity
from deployments.shares import Shares
from services.errors import GenerationFailed, MonofacetError

log = logging.getLogger("monofacet.generator")

_LEAST_STUCK_S = 60.0
# The part of a queue that a caller finds free although others have filled it.
_FEW = 8


class Sample(Protocol):
    """What the engine sees of an image that is being made."""

    index: int
    preview: bool
    error: MonofacetError | None

    @property
    def steps(self) -> int:
        """Steps in all."""

    @property
    def done(self) -> bool:
        """Whether it needs no further step."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What images must share to be in one step."""


class GenerationModel(Protocol):
    """What the engine needs of a pipeline; tests put a counting debug model here."""

    def prepare(self, task: GenerateTask) -> tuple[list[Any], list[Size]]:
        """Return the samples of a call, steered images first, then unsteered, and the size of each one's steering."""
        ...

    def step(self, samples: Sequence[Any]) -> None:
        """Take samples of one shape a step further; what fails is told by a sample's `error`."""
        ...

    def decode(self, sample: Any) -> NDArray[np.uint8]:
        """Return the picture of a finished sample, or raise its error."""
        ...

    def preview(self, sample: Any) -> NDArray[np.uint8]:
        """Return a rough picture."""
        ...

    def bytes_of(self, sample: Any) -> int:
        """Estimate the memory of a sample in a step."""
        ...


@dataclass(eq=False, slots=True)
class _Image:
    job: Job
    number: int
    sample: Sample
    size: Size
    bytes: int
    last_step: int = 0
    started: float = 0.0


@dataclass(eq=False, slots=True)
class Job:
    """One call in the engine.

    Attributes
    ----------
    task
        What it asks.
    emit
        Takes its events, from the engine's threads.
    deadline
        Time of `time.monotonic` after which nothing of it may run; None for none.
    arrived
        When it came.
    gone
        Set once its caller has left.
    images
        Its samples; empty until they are prepared.
    unfinished
        Images without a result.
    """

    task: GenerateTask
    emit: Callable[[Event], None]
    deadline: float | None
    arrived: float
    gone: bool = False
    images: list[_Image] = field(default_factory=list)
    unfinished: int = 0

    def progress(self) -> Progress:
        """Return how far its images are."""
        return Progress(
            tuple(image.sample.index for image in self.images),
            max((image.sample.steps for image in self.images), default=0),
            sum(not image.started for image in self.images),
        )


class Engine:
    """Runs jobs.

    Parameters
    ----------
    model
        The pipeline.
    max_batch
        Images of one step.
    max_queued
        Images that may wait; a job that would pass it is refused, unless its caller has few there: others who fill
        the queue keep nobody out.
    max_bytes
        Memory for the images of a step, by the model's estimate. One image is always let in.
    """

    def __init__(self, model: GenerationModel, *, max_batch: int, max_queued: int, max_bytes: int) -> None:
        self._model = model
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._max_bytes = max_bytes
        self._lock = threading.Condition()
        self._unprepared: Counter[str] = Counter()
        # In steps weighted by the memory of their images.
        self._shares = Shares()
        self._jobs: set[Job] = set()
        self._waiting: deque[_Image] = deque()
        self._active: list[_Image] = []
        self._steps = 0
        self._records: list[BatchRecord] = []
        self._closed = False
        # A step of large pictures on a slow CPU takes seconds, and no other tells how many.
        self.activity = Activity(_LEAST_STUCK_S)
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="generator-helper")
        self._thread = threading.Thread(target=self._run, name="generator-steps", daemon=True)
        self._thread.start()

    def submit(
        self, task: GenerateTask, emit: Callable[[Event], None], remaining_s: float | None = None
    ) -> Job:
        """Take a job; its events come through `emit`, the last one a `Failed` or its last image's `Finished`.

        Raises
        ------
        QueueFull
            When its images cannot wait.
        BatcherClosed
            After `close`.
        """
        now = time.monotonic()
        job = Job(task, emit, None if remaining_s is None else now + remaining_s, now, unfinished=task.images)
        with self._lock:
            if self._closed:
                raise BatcherClosed
            if not self._fits(task):
                raise QueueFull
            self._unprepared[task.caller] += task.images
            self._jobs.add(job)
        self._helper.submit(self._prepare, job)
        return job

    def _fits(self, task: GenerateTask) -> bool:
        queued = self._unprepared.total() + len(self._waiting)
        # A job is let into an empty queue whatever its size: refusing it would refuse it for ever.
        if not queued or queued + task.images <= self._max_queued:
            return True
        own = sum(image.job.task.caller == task.caller for image in self._waiting)
        own += self._unprepared[task.caller]
        return (
            own + task.images <= max(1, self._max_queued // _FEW)
            and queued + task.images <= 2 * self._max_queued
        )

    def cancel(self, job: Job) -> None:
        """Stop a job: no step of it begins from here on."""
        with self._lock:
            job.gone = True
            self._lock.notify()

    def take_records(self) -> tuple[BatchRecord, ...]:
        """Return the steps that ran since the last time."""
        with self._lock:
            records, self._records = tuple(self._records), []
        return records

    def check_health(self) -> None:
        """Raise GenerationFailed when a thread is dead or stuck."""
        if not self._thread.is_alive():
            raise GenerationFailed("the thread of the steps has ended")
        if stuck := self.activity.stuck:
            raise GenerationFailed(stuck)

    def close(self) -> None:
        """Take no more jobs, and wait for those that are there."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()
        self._helper.shutdown()

    def _prepare(self, job: Job) -> None:
        images: list[_Image] = []
        try:
            if self._alive(job):
                with self.activity.running("preparation of a call"):
                    samples, sizes = self._model.prepare(job.task)
                for number, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
                    sample.preview = job.task.preview_every > 0
                    images.append(_Image(job, number, sample, size, self._model.bytes_of(sample)))
        except MonofacetError as error:
            self._fail(job, error)
        except BaseException:  # whatever it is, it is this request's alone; the thread serves the others
            log.exception("a request cannot be prepared")
            self._fail(job, GenerationFailed("the generator failed"))
        with self._lock:
            self._unprepared -= Counter({job.task.caller: job.task.images})
            if images and not job.gone:
                job.images = images
                self._waiting.extend(images)
            self._lock.notify()

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
                    return
            except BaseException:  # the thread must outlive whatever comes, or all later requests hang
                log.exception("the engine failed")
                with self._lock:
                    for job in self._jobs:
                        self._fail(job, GenerationFailed("the generator failed"))

    def _turn(self) -> bool:
        """Take one step of whatever is there, or wait for work; return whether more may come."""
        with self._lock:
            self._drop_dead()
            self._admit()
            batch = self._next_batch()
            if not batch:
                if self._closed and not self._jobs:
                    return False
                # The helper or a caller wakes it; the time-out is for deadlines.
                self._lock.wait(0.5 if self._jobs else None)
                return True
        self._step(batch)
        return True

    def _alive(self, job: Job) -> bool:
        if not job.gone and job.deadline is not None and time.monotonic() >= job.deadline:
            self._fail(job, DeadlineExpired())
        return not job.gone

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.gone:
            self._tell(job, Failed(error))
            job.gone = True

    def _tell(self, job: Job, event: Event) -> None:
        """Hand an event to the caller of a job; one that cannot be told of it has gone."""
        if job.gone:
            return
        try:
            job.emit(event)
        except Exception:  # whoever listens is one caller, and the others' steps go on
            log.exception("a caller cannot be told")
            job.gone = True

    def _drop_dead(self) -> None:
        """Forget the images of jobs that are gone, expired or finished."""
        dead = {job for job in self._jobs if not self._alive(job) or job.unfinished == 0}
        if dead:
            self._jobs -= dead
            self._waiting = deque(image for image in self._waiting if image.job not in dead)
            self._active = [image for image in self._active if image.job not in dead]

    def _admit(self) -> None:
        used = sum(image.bytes for image in self._active)
        while self._waiting and len(self._active) < self._max_batch:
            image = self._next_image()
            if self._active and used + image.bytes > self._max_bytes:
                return
            self._waiting.remove(image)
            self._shares.charge(image.job.task.caller, image.bytes * image.sample.steps)
            image.started = time.monotonic()
            image.last_step = self._steps
            used += image.bytes
            self._active.append(image)

    def _next_image(self) -> _Image:
        """Return the oldest waiting image of the caller whose turn it is."""
        # `min` takes the first of equals, which is the oldest.
        return min(self._waiting, key=lambda image: self._shares.had(image.job.task.caller))

    def _next_batch(self) -> list[_Image]:
        """Return the images of one size whose turn it is: those of the one that has waited longest."""
        if not self._active:
            return []
        first = min(self._active, key=lambda image: image.last_step)
        return [image for image in self._active if image.sample.shape == first.sample.shape]

    def _step(self, batch: list[_Image]) -> None:
        started = time.perf_counter()
        try:
            with self.activity.running("step"):
                self._model.step([image.sample for image in batch])
        except BaseException:  # the thread must outlive the batch, or all later requests hang
            log.exception("a step failed")
            for image in batch:
                image.sample.error = GenerationFailed("the generator failed")
        self._steps += 1
        done = [image for image in batch if image.sample.done]
        with self._lock:
            self._records.append(BatchRecord(len(batch), time.perf_counter() - started))
            for image in batch:
                image.last_step = self._steps
            if done:
                self._active = [image for image in self._active if image not in done]
        for job in dict.fromkeys(image.job for image in batch):
            self._tell(job, job.progress())
        for image in batch:
            self._preview(image)
        for image in done:
            self._helper.submit(self._finish, image)

    def _preview(self, image: _Image) -> None:
        sample, every = image.sample, image.job.task.preview_every
        if not every or sample.index % every or sample.done or image.job.gone:
            return
        try:
            with self.activity.running("preview"):
                pixels = self._model.preview(sample)
        except BaseException:  # one call's preview is not its neighbours' step
            log.exception("a preview cannot be made")
            self._fail(image.job, GenerationFailed("a preview of this call cannot be made"))
        else:
            self._tell(image.job, Preview(image.number, sample.index, pixels))

    def _finish(self, image: _Image) -> None:
        job = image.job
        if self._alive(job):
            self._tell(job, self._finished(image))
        with self._lock:
            job.unfinished -= 1
            self._lock.notify()

    def _finished(self, image: _Image) -> Finished:
        pixels, error = None, None
        try:
            with self.activity.running("decoding of a picture"):
                pixels = self._model.decode(image.sample)
        except MonofacetError as caught:
            error = caught
        except BaseException:  # one image's failure is not its neighbours'
            log.exception("an image cannot be decoded")
            error = GenerationFailed("the image cannot be decoded")
        now = time.monotonic()
        waited = image.started - image.job.arrived
        size, inference = image.size, now - image.started
        return Finished(image.number, pixels, error, size.delta, waited, inference, size.dose)
