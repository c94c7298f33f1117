"""From pixels to files: PNG that carries the request which makes it again, or lossless WebP."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
from google.protobuf import json_format
from monofacet.v1 import imaging_service_pb2 as pb
from numpy.typing import NDArray

from deployments.generator.events import GenerateTask
from services.bundle.manifest import DiffusionEntry

REQUEST_CHUNK = "monofacet.request"
BUNDLE_CHUNK = "monofacet.bundle"
# Bytes of the JSON that a PNG carries; of a larger request it carries what is left without its reference pictures, and
# says so. Pillow opens no PNG with a text chunk above 1,048,576 bytes unpacked, and JSON writes a picture in base64, a
# third larger than it is: so it is the JSON that counts.
MAX_REQUEST = 1_000_000
REFERENCES_LEFT_OUT = "monofacet.references-left-out"


def picture(
    pixels: NDArray[np.uint8], image_format: int, request: pb.GenerateRequest | None = None, bundle: str = ""
) -> bytes:
    """Return an image file; the same pixels and request give the same bytes.

    Parameters
    ----------
    pixels
        uint8, shape (height, width, 3).
    image_format
        Of the contract's `ImageFormat`.
    request
        What makes this image alone again, for a PNG; None for a preview.
    bundle
        Id of the bundle.
    """
    image = PIL.Image.fromarray(pixels)
    buffer = io.BytesIO()
    if image_format == pb.IMAGE_FORMAT_WEBP:
        image.save(buffer, "WEBP", lossless=True, method=4)
        return buffer.getvalue()
    chunks = PIL.PngImagePlugin.PngInfo()
    if request is not None:
        text, whole = carried(request)
        if not whole:
            chunks.add_text(REFERENCES_LEFT_OUT, "true")
        chunks.add_itxt(REQUEST_CHUNK, text, zip=True)
        chunks.add_text(BUNDLE_CHUNK, bundle)
    image.save(buffer, "PNG", pnginfo=chunks, compress_level=6)
    return buffer.getvalue()


def carried(request: pb.GenerateRequest) -> tuple[str, bool]:
    """Return the request as one line of JSON of at most `MAX_REQUEST` bytes, and whether it is the whole request."""
    attached = pb.GenerateRequest()
    attached.CopyFrom(request)
    text = _json(attached)
    whole = len(text.encode()) <= MAX_REQUEST
    if not whole:
        leave_out_references(attached)
        text = _json(attached)
        if len(text.encode()) > MAX_REQUEST:
            # Edits of tens of thousands of features each; the two texts of a request always fit.
            attached.ClearField("steering")
            text = _json(attached)
    return text, whole


def _json(request: pb.GenerateRequest) -> str:
    return json_format.MessageToJson(request, indent=None, ensure_ascii=False)


def leave_out_references(request: pb.GenerateRequest) -> None:
    """Clear the pictures of a request, in place."""
    request.ClearField("image")
    for edit in request.steering.edits:
        if edit.reference.WhichOneof("input") == "image":
            edit.reference.ClearField("image")


def request_of_image(
    request: pb.GenerateRequest, task: GenerateTask, entry: DiffusionEntry, number: int
) -> pb.GenerateRequest:
    """Return the request that makes one image of a call again, alone, with every default spelt out.

    Parameters
    ----------
    request
        Of the call.
    task
        With its seeds.
    entry
        Whose defaults to spell out.
    number
        Of the image; the unsteered are numbered after the steered.
    """
    alone = pb.GenerateRequest()
    alone.CopyFrom(request)
    for field in ("seeds", "preview_every", "include_unsteered", "format"):
        alone.ClearField(field)
    alone.num_images = 1
    alone.seeds.append(task.seeds[number % len(task.seeds)])
    if not request.HasField("num_inference_steps"):
        alone.num_inference_steps = entry.num_inference_steps
    if not request.HasField("guidance_scale"):
        alone.guidance_scale = entry.guidance_scale
    alone.height = request.height or entry.height
    alone.width = request.width or entry.width
    if number >= len(task.seeds):
        alone.ClearField("steering")
    return alone
