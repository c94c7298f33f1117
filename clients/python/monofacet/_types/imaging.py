"""Steered generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import PIL.Image

from monofacet import _exceptions as exceptions
from monofacet._inputs import Image, Input
from monofacet._pictures import decode
from monofacet._types.brief import Brief
from monofacet._types.encoding import Floats, SparseFeatures, Timings
from monofacet._types.modality import ModalityLabel

__all__ = [
    "GenerateOptions",
    "GeneratedImage",
    "GenerationEvent",
    "GenerationPreview",
    "GenerationProgress",
    "GenerationResult",
    "NearCaption",
    "SteeringEdit",
    "SteeringPreview",
]


@dataclass(frozen=True, slots=True, repr=False)
class SteeringEdit(Brief):
    """Moves the activations of features towards a target: z' = (1 - strength) z + strength * target.

    Exactly one of `scale`, `quantile` and `reference` is set.

    Attributes
    ----------
    features
        A feature id, several, or a label, which stands for all its features.
    scale
        The target is so many times the activation, -16 to 16: 0 removes the features, 2 doubles them.
    quantile
        The target is this quantile, 0 to 1, of the activations that each feature has where it is active.
    reference
        The target is the activation in this text or image.
    strength
        0 to 4: 0 changes nothing, 1 reaches the target.
    """

    features: int | Sequence[int] | ModalityLabel | str
    scale: float | None = None
    quantile: float | None = None
    reference: Input | None = None
    strength: float = 1.0


class GenerateOptions(TypedDict, total=False):
    """What a generation may be given beside its prompt; what is left out has the server's default.

    Attributes
    ----------
    negative_prompt
        What guidance leads away from.
    image
        A picture whose embedding conditions the images beside the prompt.
    edits
        Steering, in order.
    dictionary
        Whose features are edited; the bundle's default one.
    path
        "embedding" or "prompt"; the pipeline's own.
    contrastive
        Whether the edits also change the unconditional side of guidance, the other way.
    delta
        Rescales the whole change to this size, 0 to 2, relative to the embedding.
    num_images
        As many as there are seeds, or 1.
    seeds
        One an image; drawn by the server.
    steps
        Denoising steps.
    guidance
        Scale of classifier-free guidance, 1 to 50; 1 is none.
    height, width
        Pixels.
    preview_every
        A preview after every so many steps; 0 for none.
    unsteered
        Whether each image is also made without the edits.
    format
        "png", which carries the request, or "webp", without loss.
    truncate
        Cut long texts instead of refusing them.
    """

    negative_prompt: str
    image: Image | None
    edits: Sequence[SteeringEdit]
    dictionary: str
    path: Literal["embedding", "prompt"] | None
    contrastive: bool
    delta: float | None
    num_images: int | None
    seeds: int | Sequence[int] | None
    steps: int | None
    guidance: float | None
    height: int | None
    width: int | None
    preview_every: int
    unsteered: bool
    format: Literal["png", "webp"]
    truncate: bool


@dataclass(frozen=True, slots=True, repr=False)
class GenerationProgress(Brief):
    """How far the images of a call are.

    Attributes
    ----------
    steps
        Taken of each image, in the order of the seeds, then of each unsteered twin.
    num_steps
        That each image takes.
    waiting
        Images that wait for their first step.
    """

    steps: tuple[int, ...]
    num_steps: int
    waiting: int

    @property
    def fraction(self) -> float:
        """Share of all steps that were taken, in [0, 1]."""
        return sum(self.steps) / max(1, self.num_steps * len(self.steps))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class GenerationPreview(Brief):
    """A rough picture of an unfinished image.

    Attributes
    ----------
    index, unsteered
        Which image; whether it is the unsteered twin.
    step
        Steps taken.
    image
        Small.
    """

    index: int
    unsteered: bool
    step: int
    image: PIL.Image.Image


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class GeneratedImage(Brief):
    """A finished image, or why there is none.

    Attributes
    ----------
    index, unsteered
        Which image, in the order of the seeds; whether it is the unsteered twin.
    seed
        Makes it again.
    data
        The file, as the server made it; empty if it failed.
    error
        Why it failed; None if it is there.
    delta
        Size of its steering relative to the embedding; 0 without edits.
    timings
        Seconds until its first step, and from there to its picture.
    bundle
        The bundle that answered.
    """

    index: int
    unsteered: bool
    seed: int
    data: bytes
    error: exceptions.CallError | None
    delta: float
    timings: Timings
    bundle: str

    @property
    def ok(self) -> bool:
        """Whether there is a picture."""
        return self.error is None

    @property
    def image(self) -> PIL.Image.Image:
        """The picture; raises `error` if there is none, and a ResponseError if it cannot be decoded."""
        if self.error is not None:
            raise self.error
        return decode(self.data, f"image {self.index}")


GenerationEvent: TypeAlias = GenerationProgress | GenerationPreview | GeneratedImage


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class GenerationResult(Brief):
    """All images of a call.

    Attributes
    ----------
    images
        In the order of the seeds.
    twins
        Their unsteered twins, in the same order; empty unless asked for.
    bundle
        The bundle that answered.
    """

    images: tuple[GeneratedImage, ...]
    twins: tuple[GeneratedImage, ...]
    bundle: str

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True, repr=False)
class NearCaption(Brief):
    """A caption and its cosine, in [-1, 1]."""

    text: str
    similarity: float


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SteeringPreview(Brief):
    """What edits do to an embedding.

    Attributes
    ----------
    features, steered_features
        The strongest ones before, and as the edits ask for them.
    steered_embedding
        Float32, shape [embed_dim], of length 1.
    delta
        Size of the change, in [0, 2].
    captions, steered_captions
        The nearest ones before and after.
    timings
        Seconds.
    bundle
        The bundle that answered.
    """

    features: SparseFeatures
    steered_features: SparseFeatures
    steered_embedding: Floats
    delta: float
    captions: tuple[NearCaption, ...]
    steered_captions: tuple[NearCaption, ...]
    timings: Timings
    bundle: str
