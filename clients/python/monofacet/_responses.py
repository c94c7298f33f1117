"""Answers that are more than one message read: parts of a batch, or one of several events.

All others are read by `_convert.read`. Pure: no channel is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._convert import array, read
from monofacet._status import error_from_status
from monofacet.v1 import (
    bias_service_pb2,
    defense_service_pb2,
    feature_service_pb2,
    imaging_service_pb2,
    modality_service_pb2,
)

Result = TypeVar(
    "Result", types.EncodeResult, types.ClassificationResult, types.GenderResult, types.FilterResult
)

NO_EMBEDDING = np.zeros(0, dtype=np.float32)
NO_EMBEDDING.flags.writeable = False


def joined(parts: Sequence[Result]) -> Result:
    """Join the results of the parts of a batch.

    Parameters
    ----------
    parts
        In order; at least one.

    Returns
    -------
    Result
        Arrays and tuples one after the other, the longest queueing and the sum of inference, and all else as in the
        first part.

    Raises
    ------
    ResponseError
        If the server changed its bundle on the way: parts of the answer would be of another model.
    """
    # Before the rows are joined: those of another bundle may have another length.
    if len({part.bundle for part in parts}) > 1:
        raise exceptions.ResponseError(
            "the server changed its bundle between the parts of the batch: send it again"
        )
    first, *others = parts
    if not others:
        return first
    values: dict[str, Any] = {}
    for name in [field.name for field in dataclasses.fields(first)]:
        value = getattr(first, name)
        if isinstance(value, np.ndarray):
            values[name] = np.concatenate([getattr(part, name) for part in parts])
        elif isinstance(value, tuple):
            values[name] = sum((getattr(part, name) for part in others), value)
    timings = types.Timings(
        max(part.timings.queue for part in parts), sum(part.timings.inference for part in parts)
    )
    return dataclasses.replace(first, **values, timings=timings)


def encode(
    responses: Sequence[feature_service_pb2.EncodeResponse], sizes: Sequence[int], embeddings: bool
) -> types.EncodeResult:
    """Read the answers to the parts of a batch.

    Parameters
    ----------
    responses
        One a part, in order; at least one.
    sizes
        Inputs of each part.
    embeddings
        Whether embeddings were asked for.

    Returns
    -------
    EncodeResult
        Of the whole batch.

    Raises
    ------
    ResponseError
        If an answer does not hold one embedding and norm an input, or the server changed its bundle on the
        way.
    """
    parts = []
    for response, size in zip(responses, sizes, strict=True):
        rows = array(response.embeddings) if embeddings else np.zeros((size, 0), dtype=np.float32)
        if rows.ndim != 2 or len(rows) != size or len(response.norms) != size:
            raise exceptions.ResponseError(
                f"the answer holds embeddings of shape {list(rows.shape)} and {len(response.norms)} norms "
                f"for {size} inputs"
            )
        parts.append(read(types.EncodeResult, response, embeddings=rows))
    return joined(parts)


def bad_item(name: str, error: exceptions.MonofacetError, bundle: str = "") -> types.StreamResult:
    """Make the result of an item that was not encoded.

    Parameters
    ----------
    name
        The item's id.
    error
        Why.
    bundle
        The bundle that refused it, or empty.

    Returns
    -------
    StreamResult
        With nothing but the error.
    """
    return types.StreamResult(name, NO_EMBEDDING, 0.0, None, error, None, bundle)


def stream_encode(response: feature_service_pb2.StreamEncodeResponse) -> types.StreamResult:
    """Read the answer to one item.

    Parameters
    ----------
    response
        An encoding or an error.

    Returns
    -------
    StreamResult
        Of the item.
    """
    if response.WhichOneof("result") == "error":
        return bad_item(response.id, error_from_status(response.error), response.bundle)
    encoding = response.encoding
    outer = {"id": response.id, "timings": read(types.Timings, response.timings), "bundle": response.bundle}
    if not encoding.HasField("embedding"):
        outer["embedding"] = NO_EMBEDDING
    return read(types.StreamResult, encoding, error=None, **outer)


def classification(
    responses: Sequence[modality_service_pb2.ClassifyModalityResponse], sizes: Sequence[int]
) -> types.ClassificationResult:
    """Read the answers to the parts of a batch; as `encode`, with one classification an input."""
    _check_count(responses, sizes)
    return joined([read(types.ClassificationResult, response) for response in responses])


def gender(
    responses: Sequence[bias_service_pb2.ClassifyGenderResponse], sizes: Sequence[int]
) -> types.GenderResult:
    """Read the answers to the parts of a batch; as `encode`, with one classification an input."""
    _check_count(responses, sizes)
    return joined([read(types.GenderResult, response) for response in responses])


def _check_count(responses: Sequence[Any], sizes: Sequence[int]) -> None:
    for response, size in zip(responses, sizes, strict=True):
        if len(response.classifications) != size:
            raise exceptions.ResponseError(
                f"the answer holds {len(response.classifications)} classifications for {size} inputs"
            )


def filtered(
    responses: Sequence[defense_service_pb2.FilterAdversarialResponse], sizes: Sequence[int]
) -> types.FilterResult:
    """Read the answers to the parts of a batch.

    Parameters
    ----------
    responses
        One a part, in order; at least one.
    sizes
        Images of each part.

    Returns
    -------
    FilterResult
        Of the whole batch.

    Raises
    ------
    ResponseError
        If an answer does not hold one verdict and two embeddings an image, or the server changed its bundle on the
        way.
    """
    parts = []
    for response, size in zip(responses, sizes, strict=True):
        before, after = array(response.embeddings_before), array(response.embeddings_after)
        if not len(response.images) == len(before) == len(after) == size or before.shape != after.shape:
            raise exceptions.ResponseError(
                f"the answer holds {len(response.images)} verdicts and embeddings of shapes {list(before.shape)} "
                f"and {list(after.shape)} for {size} images"
            )
        rows = zip(response.images, before, after, strict=True)
        images = tuple(read(types.FilteredImage, image, before=old, after=new) for image, old, new in rows)
        parts.append(read(types.FilterResult, response, images=images))
    return joined(parts)


def generation_event(response: imaging_service_pb2.GenerateResponse) -> types.GenerationEvent:
    """Read one event of a generation.

    Parameters
    ----------
    response
        With one event.

    Returns
    -------
    GenerationProgress, GenerationPreview or GeneratedImage
        The event.

    Raises
    ------
    ResponseError
        If it holds none that this client knows, or a preview that cannot be decoded.
    """
    match response.WhichOneof("event"):
        case "progress":
            return read(types.GenerationProgress, response.progress)
        case "preview":
            return read(types.GenerationPreview, response.preview)
        case "image":
            timings = read(types.Timings, response.timings)
            return read(types.GeneratedImage, response.image, timings=timings, bundle=response.bundle)
        case other:
            raise exceptions.ResponseError(f"the answer holds an event of kind {other!r}")


def generation_result(events: Iterable[types.GenerationEvent]) -> types.GenerationResult:
    """Gather the images of a generation.

    Parameters
    ----------
    events
        All of them.

    Returns
    -------
    GenerationResult
        With the images in order.

    Raises
    ------
    ResponseError
        If the stream ended without an image.
    """
    made = [event for event in events if isinstance(event, types.GeneratedImage)]
    if not made:
        raise exceptions.ResponseError("the server ended the stream without an image")
    made.sort(key=lambda image: image.index)
    return types.GenerationResult(
        tuple(image for image in made if not image.unsteered),
        tuple(image for image in made if image.unsteered),
        made[0].bundle,
    )
