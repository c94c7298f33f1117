"""Requests of ImagingService. Pure: no channel is touched."""

from __future__ import annotations

import io
from collections.abc import Sequence

import PIL.Image
from google.protobuf import json_format

from monofacet import _exceptions as exceptions
from monofacet._inputs import Image, Input, image_bytes, sendable, to_input
from monofacet._pictures import PICTURE_ERRORS
from monofacet._requests import label_value
from monofacet._types import GenerateOptions, SteeringAttribute, SteeringEdit
from monofacet.v1 import common_pb2, imaging_service_pb2

REQUEST_CHUNK = "monofacet.request"
LEFT_OUT_CHUNK = "monofacet.references-left-out"

PATHS = {
    None: imaging_service_pb2.STEERING_PATH_UNSPECIFIED,
    "embedding": imaging_service_pb2.STEERING_PATH_EMBEDDING,
    "prompt": imaging_service_pb2.STEERING_PATH_PROMPT,
}
FORMATS = {"png": imaging_service_pb2.IMAGE_FORMAT_PNG, "webp": imaging_service_pb2.IMAGE_FORMAT_WEBP}


@sendable("the edit")
def edit(value: SteeringEdit) -> imaging_service_pb2.SteeringEdit:
    """Make the contract's edit.

    Parameters
    ----------
    value
        With exactly one target.

    Returns
    -------
    imaging_service_pb2.SteeringEdit
        For a `Steering`.

    Raises
    ------
    InputError
        If features or target cannot be sent.
    """
    message = imaging_service_pb2.SteeringEdit(strength=value.strength)
    if isinstance(value.features, str):
        message.label = label_value(value.features)
    else:
        ids = [value.features] if isinstance(value.features, int) else list(value.features)
        if not ids or not all(0 <= feature < 2**32 for feature in ids):
            raise exceptions.InputError("an edit names features by ids from 0, or by a label")
        message.ids.ids.extend(ids)
    targets = {"scale": value.scale, "quantile": value.quantile, "reference": value.reference}
    given = [name for name, target in targets.items() if target is not None]
    if len(given) != 1:
        raise exceptions.InputError("an edit has exactly one of scale, quantile and reference")
    if value.scale is not None:
        message.scale = value.scale
    elif value.quantile is not None:
        message.quantile = value.quantile
    elif value.reference is not None:
        message.reference.CopyFrom(to_input(value.reference))
    return message


@sendable("the steering")
def steering(
    edits: Sequence[SteeringEdit],
    dictionary: str = "",
    path: str | None = None,
    contrastive: bool = False,
    delta: float | None = None,
    attributes: Sequence[SteeringAttribute | str] | SteeringAttribute | str = (),
    dose: float | None = None,
) -> imaging_service_pb2.Steering:
    """Make the contract's steering.

    Parameters
    ----------
    edits
        In order.
    dictionary
        Empty for the default one.
    path
        "embedding", "prompt", or None for the pipeline's own.
    contrastive
        Whether the unconditional side changes too.
    delta
        Size that the change is rescaled to; None to leave it.
    attributes
        Attributes to turn, after the edits.
    dose
        Dose that the change is rescaled to; None to leave it.

    Returns
    -------
    imaging_service_pb2.Steering
        For a request.

    Raises
    ------
    InputError
        If an edit cannot be sent, or there is no such path.
    """
    if path not in PATHS:
        raise exceptions.InputError(f"{path!r} is no path: choose embedding or prompt")
    message = imaging_service_pb2.Steering(dictionary=dictionary, path=PATHS[path])
    for position, value in enumerate([edits] if isinstance(edits, SteeringEdit) else edits):
        try:
            message.edits.append(edit(value))
        except exceptions.InputError as error:
            raise exceptions.InputError(f"edits[{position}]: {error}") from error
    if contrastive:
        message.guidance = imaging_service_pb2.STEERING_GUIDANCE_CONTRASTIVE
    if delta is not None:
        message.delta = delta
    if dose is not None:
        message.dose = dose
    several = [attributes] if isinstance(attributes, str | SteeringAttribute) else attributes
    for turn in several:
        if isinstance(turn, str):
            message.attributes.add(name=turn)
        else:
            message.attributes.add(name=turn.name, strength=turn.strength)
    return message


@sendable("the request")
def generate(prompt: str, options: GenerateOptions) -> imaging_service_pb2.GenerateRequest:
    """Make a Generate request.

    Parameters
    ----------
    prompt
        What to draw.
    options
        What is left out stays unset.

    Returns
    -------
    GenerateRequest
        For one call.

    Raises
    ------
    InputError
        If an option is unknown or cannot be sent.
    """
    unknown = set(options) - GenerateOptions.__annotations__.keys()
    if unknown:
        raise exceptions.InputError(f"a generation has no options {', '.join(sorted(unknown))}")
    image_format = options.get("format", "png")
    if image_format not in FORMATS:
        raise exceptions.InputError(f"{image_format!r} is no format: choose png or webp")
    request = imaging_service_pb2.GenerateRequest(
        prompt=prompt,
        negative_prompt=options.get("negative_prompt", ""),
        num_images=options.get("num_images") or 0,
        seeds=_seeds(options.get("seeds")),
        height=options.get("height") or 0,
        width=options.get("width") or 0,
        preview_every=options.get("preview_every", 0),
        include_unsteered=options.get("unsteered", False),
        format=FORMATS[image_format],
        truncate_text=options.get("truncate", False),
    )
    steps, guidance = options.get("steps"), options.get("guidance")
    if steps is not None:
        request.num_inference_steps = steps
    if guidance is not None:
        request.guidance_scale = guidance
    picture = options.get("image")
    if picture is not None:
        request.image.data = image_bytes(picture)
    edits, attributes = options.get("edits", ()), options.get("attributes", ())
    if edits or attributes:
        request.steering.CopyFrom(
            steering(
                edits,
                options.get("dictionary", ""),
                options.get("path"),
                options.get("contrastive", False),
                options.get("delta"),
                attributes,
                options.get("dose"),
            )
        )
    return request


def _seeds(seeds: int | Sequence[int] | None) -> list[int]:
    if seeds is None:
        return []
    return [seeds] if isinstance(seeds, int) else list(seeds)


def request_of(image: Image) -> imaging_service_pb2.GenerateRequest:
    """Read the request that an image carries.

    Parameters
    ----------
    image
        A PNG file that a server made: a path object or bytes.

    Returns
    -------
    GenerateRequest
        That makes this image again.

    Raises
    ------
    InputError
        If it cannot be read, or carries no request, or one whose reference pictures were too large to carry.
    """
    data = image_bytes(image)
    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            # The chunks may lie behind the pixels.
            opened.load()
            chunks = dict(getattr(opened, "text", {}))
    except PICTURE_ERRORS as error:
        raise exceptions.InputError(f"the image cannot be read: {error}") from error
    if REQUEST_CHUNK not in chunks:
        raise exceptions.InputError(
            "the image does not say how it was made: it was changed, or made elsewhere"
        )
    if LEFT_OUT_CHUNK in chunks:
        raise exceptions.InputError("the image's reference pictures were too large for it to carry")
    try:
        return json_format.Parse(chunks[REQUEST_CHUNK], imaging_service_pb2.GenerateRequest())
    except json_format.ParseError as error:
        raise exceptions.InputError("the image's request cannot be read") from error


@sendable("the preview")
def preview_steering(
    value: Input,
    message: imaging_service_pb2.Steering,
    max_captions: int,
    max_features: int,
    truncate: bool,
) -> imaging_service_pb2.PreviewSteeringRequest:
    """Make a PreviewSteering request.

    Parameters
    ----------
    value
        What to steer.
    message
        The edits.
    max_captions, max_features
        Listed before and after.
    truncate
        Whether long texts are cut.

    Returns
    -------
    PreviewSteeringRequest
        For one call.

    Raises
    ------
    InputError
        If a number or the input cannot be sent.
    """
    if not 0 <= max_captions <= 100 or not 1 <= max_features <= 65536:
        raise exceptions.InputError("max_captions is 0 to 100, and max_features 1 to 65536")
    item: common_pb2.Input = to_input(value)
    return imaging_service_pb2.PreviewSteeringRequest(
        input=item,
        steering=message,
        max_captions=max_captions,
        max_features=max_features,
        truncate_text=truncate,
    )


@sendable("the name")
def get_attribute(name: str) -> imaging_service_pb2.GetAttributeRequest:
    """Make a GetAttribute request.

    Parameters
    ----------
    name
        Of the attribute.

    Returns
    -------
    GetAttributeRequest
        For one call.

    Raises
    ------
    InputError
        If it cannot be sent.
    """
    return imaging_service_pb2.GetAttributeRequest(name=name)
