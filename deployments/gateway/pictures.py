"""From pixels to files: PNG that carries the request which makes it again, or lossless WebP."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
from google.protobuf import json_format
from monofacet.v1 import imaging_service_pb2 as pb
from numpy.typing import NDArray

from deployments.generation_work import GenerateWork
from services.manifest import DiffusionEntry

REQUEST_CHUNK = "monofacet.request"
BUNDLE_CHUNK = "monofacet.bundle"
# Bytes of reference pictures that a PNG carries; beyond it carries the request without them, and says so.
MAX_REFERENCES = 1024 * 1024
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
        told = pb.GenerateRequest()
        told.CopyFrom(request)
        if told.ByteSize() > MAX_REFERENCES:
            leave_out_references(told)
            chunks.add_text(REFERENCES_LEFT_OUT, "true")
        text = json_format.MessageToJson(told, indent=None, ensure_ascii=False)
        chunks.add_itxt(REQUEST_CHUNK, text, zip=True)
        chunks.add_text(BUNDLE_CHUNK, bundle)
    image.save(buffer, "PNG", pnginfo=chunks, compress_level=6)
    return buffer.getvalue()


def leave_out_references(request: pb.GenerateRequest) -> None:
    """Clear the pictures of a request, in place."""
    request.ClearField("image")
    for edit in request.steering.edits:
        if edit.reference.WhichOneof("input") == "image":
            edit.reference.ClearField("image")


def request_of_image(
    request: pb.GenerateRequest, work: GenerateWork, entry: DiffusionEntry, number: int
) -> pb.GenerateRequest:
    """Return the request that makes one image of a call again, alone, with every default spelt out.

    Parameters
    ----------
    request
        Of the call.
    work
        With its seeds.
    entry
        Whose defaults to spell out.
    number
        Of the image; twins are numbered after the images.
    """
    alone = pb.GenerateRequest()
    alone.CopyFrom(request)
    for field in ("seeds", "preview_every", "include_unsteered", "format"):
        alone.ClearField(field)
    alone.num_images = 1
    alone.seeds.append(work.seeds[number % len(work.seeds)])
    if not request.HasField("num_inference_steps"):
        alone.num_inference_steps = entry.num_inference_steps
    if not request.HasField("guidance_scale"):
        alone.guidance_scale = entry.guidance_scale
    alone.height = request.height or entry.height
    alone.width = request.width or entry.width
    if number >= len(work.seeds):
        alone.ClearField("steering")
    return alone
