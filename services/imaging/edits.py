"""What a caller asks of features: edits and how they enter the pipeline. Plain values, no torch.

An edit moves activations z towards a target, z'_j = (1 - a) z_j + a target_j, where a is its strength. So
strength 0 changes nothing whatever the operation, and strength 1 reaches the target, or goes past a quantile where
that is what it takes to be seen. An attribute is a direction that the bundle has fitted, by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from services.modality.tables import Label

SteeringPath = Literal["embedding", "prompt"]
Guidance = Literal["conditional", "contrastive"]

MAX_STRENGTH = 4.0


@dataclass(frozen=True)
class Scale:
    """The target is `factor` times the activation: 0 removes a feature, 2 doubles it."""

    factor: float


@dataclass(frozen=True)
class SetQuantile:
    """The target is the quantile `q`, in [0, 1], of the activations that the feature has where it is active.

    In a bundle with doses a rise that is too small to be seen goes past it, to the bundle's unit of dose at strength 1.
    """

    q: float


@dataclass(frozen=True)
class FromReference:
    """The target is the activation of a reference: an encoded image file or a text, exactly one of the two."""

    image: bytes | None = None
    text: str | None = None


Operation = Scale | SetQuantile | FromReference


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes
    ----------
    features : tuple of int, or Label
        Feature ids, or every feature of a label of the dictionary's modality table.
    operation : Scale, SetQuantile or FromReference
        What the target is.
    strength : float
        a, in [0, 4]; over 1 goes past the target.
    """

    features: tuple[int, ...] | Label
    operation: Operation
    strength: float = 1.0


@dataclass(frozen=True)
class AttributeEdit:
    """Turns an attribute of the bundle, by its name.

    Attributes
    ----------
    name : str
        Of the attribute.
    strength : float
        In [0, 4]; 1 is the dose at which it was measured.
    """

    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class Steering:
    """The edits of one request, in order, and their way into the pipeline.

    Attributes
    ----------
    edits : tuple of Edit
        Each works on what the one before left. None: nothing is steered.
    dictionary : str
        Whose features they are; empty for the bundle's default.
    path : {"embedding", "prompt"} or None
        None for the pipeline's own.
    guidance : {"conditional", "contrastive"}
        Where the change goes: to the conditional side of classifier-free guidance, or also, negated, to the
        unconditional side.
    delta : float or None
        If set, in [0, 2], the change is rescaled so that ||e' - e|| / rho is this: edits of different features
        become comparable.
    attributes : tuple of AttributeEdit
        Applied after the edits; they add up.
    dose : float or None
        If set, the change is rescaled to this dose (see `services.imaging.dose`), but not much past the activations
        of a reference. Not together with `delta`.
    """

    edits: tuple[Edit, ...] = ()
    dictionary: str = ""
    path: SteeringPath | None = None
    guidance: Guidance = "conditional"
    delta: float | None = None
    attributes: tuple[AttributeEdit, ...] = ()
    dose: float | None = None

    def __bool__(self) -> bool:
        return bool(self.edits or self.attributes)


@dataclass(frozen=True)
class ImageRequest:
    """One image.

    Attributes
    ----------
    prompt, negative_prompt : str
        Texts; the negative one is what guidance leads away from.
    image : bytes or None
        Encoded reference picture, whose embedding conditions the image beside the prompt. None: the prompt's
        own text embedding takes its place where the pipeline was trained for that.
    steering : Steering
        Edits.
    seed : int
        0 to 2^63 - 1. Of this image alone.
    num_inference_steps, guidance_scale, height, width : number or None
        None for the pipeline's defaults. Sizes in pixels.
    truncate : bool
        Cut prompts at the context length instead of refusing them.
    """

    prompt: str = ""
    negative_prompt: str = ""
    image: bytes | None = None
    steering: Steering = field(default_factory=Steering)
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    truncate: bool = False
