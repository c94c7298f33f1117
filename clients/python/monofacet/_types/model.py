"""What a server serves."""

from __future__ import annotations

from dataclasses import dataclass, field

from monofacet._convert import wire
from monofacet._types.bias import Ablation
from monofacet._types.brief import Brief

__all__ = [
    "DictionaryInfo",
    "Limits",
    "Model",
    "Runtime",
    "Tower",
]


@dataclass(frozen=True, slots=True, repr=False)
class Tower(Brief):
    """The CLIP model of a bundle.

    Attributes
    ----------
    architecture, fingerprint
        A short description, and the SHA-256 over configuration and weights.
    embed_dim, image_size, context_length
        Length of an embedding; pixels along a side; tokens.
    logit_scale
        Factor on the cosine before the softmax.
    parameters
        Of both towers together.
    """

    architecture: str
    embed_dim: int
    image_size: int
    context_length: int
    logit_scale: float
    parameters: int
    fingerprint: str


@dataclass(frozen=True, slots=True, repr=False)
class DictionaryInfo(Brief):
    """A dictionary of a bundle.

    Attributes
    ----------
    name, kind
        Its name in requests; ``neurons``, ``sae``, ``sae-group``, ``sae-pair`` or ``ncl``.
    n_features, embed_dim
        Its size.
    l0
        Mean number of active features an input, or None.
    is_default, has_modality, has_cards
        Whether it is used when none is named; has a modality table; has top images and texts.
    sha256
        Of its weights.
    metrics
        As measured when the bundle was made.
    """

    name: str
    kind: str
    n_features: int
    embed_dim: int
    l0: float | None
    is_default: bool
    has_modality: bool
    has_cards: bool
    sha256: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class Runtime(Brief):
    """What a bundle runs on.

    Attributes
    ----------
    backend, device, precision
        Such as ``torch``, ``cpu``, ``fp32``.
    threads, replicas
        Threads of one replica, and replicas that run.
    """

    backend: str
    device: str
    precision: str
    threads: int
    replicas: int


@dataclass(frozen=True, slots=True, repr=False)
class Limits(Brief):
    """Every limit of the server; sizes in bytes, images in pixels, durations in seconds (0: none).

    Attributes
    ----------
    max_inputs, max_request_bytes, max_response_bytes
        Of one request and its answer.
    max_image_bytes, max_image_pixels, min_image_side, max_image_aspect_ratio, image_formats, max_text_bytes
        Of one input.
    max_queued_inputs, max_concurrent_calls
        Past these the server sheds load.
    max_stream_in_flight, max_score_pairs, max_audit_items
        Of one stream.
    max_page_size, max_call_duration
        Of a list, and of any call.
    max_images, max_queued_images
        Of one generation, and of all that wait.
    """

    max_inputs: int
    max_request_bytes: int
    max_response_bytes: int
    max_image_bytes: int
    max_image_pixels: int
    image_formats: tuple[str, ...]
    max_text_bytes: int
    max_queued_inputs: int
    max_stream_in_flight: int
    max_score_pairs: int
    max_page_size: int
    max_call_duration: float
    max_concurrent_calls: int
    min_image_side: int
    max_image_aspect_ratio: int
    max_audit_items: int
    max_images: int
    max_queued_images: int


@dataclass(frozen=True, slots=True, repr=False)
class Pipeline(Brief):
    """The text-to-image pipeline.

    Attributes
    ----------
    kind
        Its class in diffusers.
    paths
        Ways to steer it, its own first; empty if it cannot be steered, or is not ready.
    height, width, max_height, max_width
        Default and largest size, pixels.
    num_inference_steps, max_inference_steps
        Default and largest number of steps.
    guidance_scale
        Default scale of guidance; 1 is none.
    embedding_from_prompt
        Whether the prompt's own embedding conditions an image without a reference picture.
    takes_image
        Whether it takes reference pictures.
    ready
        Whether it is loaded and warm.
    """

    kind: str
    paths: tuple[str, ...]
    height: int
    width: int
    max_height: int
    max_width: int
    num_inference_steps: int
    max_inference_steps: int
    guidance_scale: float
    embedding_from_prompt: bool
    takes_image: bool
    ready: bool


@dataclass(frozen=True, slots=True, repr=False)
class Model(Brief):
    """A bundle that the server serves.

    Attributes
    ----------
    bundle, name, description, sha256, licences
        Its id (``name@hash``) and what its manifest says.
    tower, dictionaries, runtime, limits
        What it is made of, what it runs on, and within which limits.
    metrics
        As measured when the bundle was made.
    files
        SHA-256 of each file by path; only from `Client.model`.
    server_version
        Of the server that answered.
    pipeline
        What makes images; None if the bundle has none.
    is_default
        Whether calls that name no bundle get this one.
    recommended_ablation
        What the bundle's own study chose to remove of gender; None if it chose nothing.
    """

    bundle: str
    name: str
    description: str
    sha256: str
    licences: tuple[str, ...]
    tower: Tower
    dictionaries: tuple[DictionaryInfo, ...]
    runtime: Runtime
    limits: Limits
    metrics: dict[str, float]
    files: dict[str, str] = field(
        metadata=wire(lambda message: {item.path: item.sha256 for item in message.files})
    )
    server_version: str
    pipeline: Pipeline | None = None
    is_default: bool = True
    recommended_ablation: Ablation | None = None

    @property
    def default_dictionary(self) -> DictionaryInfo | None:
        """The dictionary that requests get when they name none."""
        return next((dictionary for dictionary in self.dictionaries if dictionary.is_default), None)
