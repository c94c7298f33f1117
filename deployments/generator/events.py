"""What the gateway and the generator say to each other; plain data, and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deployments.batching import BatchRecord
from services.imaging.edits import ImageRequest


@dataclass(frozen=True, slots=True)
class GenerateTask:
    """What one call asks to be made.

    Attributes
    ----------
    request
        What its images share; its own seed does not count.
    seeds
        One an image.
    unsteered
        Also make each image without the edits.
    preview_every
        Steps between previews; 0 for none.
    caller
        Whose call it is; callers share a generator evenly.
    """

    request: ImageRequest
    seeds: tuple[int, ...]
    unsteered: bool = False
    preview_every: int = 0
    caller: str = ""

    @property
    def images(self) -> int:
        """Images to make."""
        return len(self.seeds) * (2 if self.unsteered else 1)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the images of a call are: steps taken of each, of how many, and how many wait."""

    steps: tuple[int, ...]
    num_steps: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough picture, uint8, shape (height, width, 3), of an image; the unsteered are numbered after the steered."""

    number: int
    step: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished image: its picture, uint8, shape (height, width, 3), or why there is none.

    Attributes
    ----------
    number
        Of the image, from 0; the unsteered are numbered after the steered.
    pixels, error
        One of the two is None.
    delta
        Size of its steering.
    dose
        The same as the generator sees it; None where the bundle knows no doses.
    queue_s, inference_s
        Seconds from its arrival to its first step, and from there to its picture.
    """

    number: int
    pixels: NDArray[np.uint8] | None
    error: Exception | None
    delta: float
    queue_s: float
    inference_s: float
    dose: float | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The whole call failed; nothing follows."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Size:
    """How far edits move an embedding: relative to its length, and as the generator sees it (None without doses)."""

    delta: float = 0.0
    dose: float | None = None


Event = Progress | Preview | Finished | Failed


@dataclass(frozen=True, slots=True)
class Events:
    """What happened since the last message: events of one call, and the steps that the generator ran.

    Attributes
    ----------
    events
        In order.
    records
        Each step is reported exactly once, whichever call's message that is.
    """

    events: tuple[Event, ...]
    records: tuple[BatchRecord, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """What a generator runs on.

    Attributes
    ----------
    device, precision, threads
        As in the contract's `Runtime`.
    paths
        Ways to steer its images, the pipeline's own first.
    takes_image
        Whether it takes reference pictures.
    batching
        As in `services.imaging.denoiser`.
    bytes_per_image
        Estimate of the memory of one image in a step.
    """

    device: str
    precision: str
    threads: int
    paths: tuple[str, ...]
    takes_image: bool
    batching: str
    bytes_per_image: int
