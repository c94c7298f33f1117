"""Steered generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

import PIL.Image

from monofacet import _exceptions as exceptions
from monofacet._convert import wire
from monofacet._inputs import Image, Input
from monofacet._pictures import decode
from monofacet._status import error_from_status
from monofacet._types.brief import Brief
from monofacet._types.encoding import Floats, SparseFeatures, Timings
from monofacet._types.modality import ModalityLabel
from monofacet.v1 import imaging_service_pb2

__all__ = [
    "Attribute",
    "AttributeList",
    "AttributeMeasures",
    "AttributeShare",
    "GenerateOptions",
    "GeneratedImage",
    "GenerationEvent",
    "GenerationPreview",
    "GenerationProgress",
    "GenerationResult",
    "NearCaption",
    "SteeringAttribute",
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
        The target is this quantile, 0 to 1, of the activations that each feature has where it is active; in a bundle
        with doses what is too small to be seen goes past it.
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


@dataclass(frozen=True, slots=True, repr=False)
class SteeringAttribute(Brief):
    """Turns an attribute of the bundle.

    Attributes
    ----------
    name
        As `Client.attributes` lists it.
    strength
        0 to 4: 0 changes nothing, 1 is the dose at which it was measured.
    """

    name: str
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
    attributes
        Attributes to turn, by name or with a strength; after the edits.
    dose
        Rescales the whole change to this dose, 0 to 4: its length as the generator sees it.
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
    attributes: Sequence[SteeringAttribute | str]
    dose: float | None
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
    num_steps: int = field(metadata=wire("num_inference_steps"))
    waiting: int

    @property
    def fraction(self) -> float:
        """Share of all steps that were taken, in [0, 1]."""
        return sum(self.steps) / max(1, self.num_steps * len(self.steps))


def _preview(message: Any) -> PIL.Image.Image:
    return decode(message.image.data, f"the preview of image {message.index}")


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
    image: PIL.Image.Image = field(metadata=wire(_preview))


def _failure(message: Any) -> exceptions.CallError | None:
    completed = message.finish_reason == imaging_service_pb2.FINISH_REASON_COMPLETED
    return None if completed else error_from_status(message.error)


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
    dose
        The same as the generator sees it; None where the bundle knows no doses.
    timings
        Seconds until its first step, and from there to its picture.
    bundle
        The bundle that answered.
    """

    index: int
    unsteered: bool
    seed: int
    data: bytes = field(metadata=wire(lambda message: message.image.data))
    error: exceptions.CallError | None = field(metadata=wire(_failure))
    delta: float
    dose: float | None
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
    dose
        The same as the generator sees it; None where the bundle knows no doses.
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
    dose: float | None
    captions: tuple[NearCaption, ...]
    steered_captions: tuple[NearCaption, ...]
    timings: Timings
    bundle: str


@dataclass(frozen=True, slots=True, repr=False)
class AttributeShare(Brief):
    """A share of pictures with its 95% interval, all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, repr=False)
class AttributeMeasures(Brief):
    """What an attribute did at strength 1, on concepts that took no part in its fit.

    Attributes
    ----------
    pictures
        Steered pictures.
    hit, hit_before
        Share of them, and of their twins without it, in which a probe finds the attribute.
    concept_kept, concept_kept_before
        Of those whose twin a judge takes for its concept, the share that it still does; the share of such twins.
    off_distribution, off_distribution_before
        Mean share of held-out embeddings that lie nearer to the training data, in [0, 1]; 0.5 is as usual.
    """

    pictures: int
    hit: AttributeShare
    hit_before: AttributeShare
    concept_kept: AttributeShare
    concept_kept_before: AttributeShare
    off_distribution: float
    off_distribution_before: float


@dataclass(frozen=True, slots=True, repr=False)
class Attribute(Brief):
    """The card of an attribute.

    Attributes
    ----------
    name
        What edits name it by.
    group
        What it is one value of.
    features
        What it is made of, and how much it adds to each up to a common factor; largest first.
    dose
        Of strength 1.
    pairs
        Pairs of drawings of one concept that it was fitted on.
    measures
        What it does; None where it was not measured.
    """

    name: str
    group: str
    features: SparseFeatures
    dose: float
    pairs: int
    measures: AttributeMeasures | None


@dataclass(frozen=True, slots=True, repr=False)
class AttributeList(Brief):
    """All attributes of a bundle.

    Attributes
    ----------
    attributes
        In the bundle's order, groups together; empty in a bundle without any.
    unit_dose
        Dose that an edit to a quantile is lengthened to at strength 1; None where the bundle knows no doses.
    bundle
        The bundle that answered.
    """

    attributes: tuple[Attribute, ...]
    unit_dose: float | None
    bundle: str

    def __len__(self) -> int:
        return len(self.attributes)
