"""From the contract's steering to the domain's, and what a generation asks for."""

from __future__ import annotations

import secrets
from typing import Literal

from monofacet.v1 import common_pb2
from monofacet.v1 import imaging_service_pb2 as pb

from deployments.generator.events import GenerateTask
from services.errors import InvalidInput
from services.imaging.edits import (
    AttributeEdit,
    Edit,
    FromReference,
    ImageRequest,
    Operation,
    Scale,
    SetQuantile,
    Steering,
    SteeringPath,
)
from services.modality.tables import Label

_PATHS: dict[int, SteeringPath | None] = {
    pb.STEERING_PATH_UNSPECIFIED: None,
    pb.STEERING_PATH_EMBEDDING: "embedding",
    pb.STEERING_PATH_PROMPT: "prompt",
}
# Seeds that the server draws are short enough to be typed again.
_DRAWN_SEEDS = 2**32


def steering_of(message: pb.Steering) -> Steering:
    """Return the steering that a validated message asks for."""
    contrastive = message.guidance == pb.STEERING_GUIDANCE_CONTRASTIVE
    guidance: Literal["conditional", "contrastive"] = "contrastive" if contrastive else "conditional"
    return Steering(
        tuple(map(_edit, message.edits)),
        message.dictionary,
        _PATHS[message.path],
        guidance,
        message.delta if message.HasField("delta") else None,
        tuple(
            AttributeEdit(turn.name, turn.strength if turn.HasField("strength") else 1.0)
            for turn in message.attributes
        ),
        message.dose if message.HasField("dose") else None,
    )


def _edit(message: pb.SteeringEdit) -> Edit:
    features: tuple[int, ...] | Label
    if message.WhichOneof("features") == "ids":
        features = tuple(message.ids.ids)
    else:
        features = Label(common_pb2.ModalityLabel.Name(message.label).removeprefix("MODALITY_LABEL_"))
    operation: Operation
    match message.WhichOneof("operation"):
        case "scale":
            operation = Scale(message.scale)
        case "quantile":
            operation = SetQuantile(message.quantile)
        case _:
            operation = _reference(message.reference)
    return Edit(features, operation, message.strength if message.HasField("strength") else 1.0)


def _reference(message: common_pb2.Input) -> FromReference:
    if message.WhichOneof("input") == "image":
        return FromReference(image=message.image.data)
    return FromReference(text=message.text)


def texts_of(request: pb.GenerateRequest) -> dict[str, str]:
    """Return every text of a request by its field path."""
    references = {
        f"steering.edits[{i}].reference.text": edit.reference.text
        for i, edit in enumerate(request.steering.edits)
    }
    return {"prompt": request.prompt, "negative_prompt": request.negative_prompt, **references}


def task_of(request: pb.GenerateRequest, max_images: int) -> GenerateTask:
    """Return what a validated request asks for, with a seed for each image.

    Raises
    ------
    InvalidInput
        When it asks for more than `max_images` images, the unsteered counted.
    """
    count = request.num_images or len(request.seeds) or 1
    seeds = tuple(request.seeds) or tuple(secrets.randbelow(_DRAWN_SEEDS) for _ in range(count))
    task = GenerateTask(
        ImageRequest(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            image=request.image.data if request.HasField("image") else None,
            steering=steering_of(request.steering),
            num_inference_steps=request.num_inference_steps
            if request.HasField("num_inference_steps")
            else None,
            guidance_scale=request.guidance_scale if request.HasField("guidance_scale") else None,
            height=request.height or None,
            width=request.width or None,
            truncate=request.truncate_text,
        ),
        seeds,
        request.include_unsteered,
        request.preview_every,
    )
    if task.images > max_images:
        message = f"{task.images} images, the unsteered counted; {max_images} are allowed"
        raise InvalidInput(message, [("num_images", message)], reason="TOO_MANY_IMAGES")
    return task
