"""Answers of FeatureService, and what all answers share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._status import error_from_status
from monofacet.v1 import common_pb2, feature_service_pb2

DTYPES: dict[int, npt.DTypeLike] = {
    common_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}


def array(tensor: common_pb2.Tensor) -> npt.NDArray[Any]:
    """Read a tensor.

    Parameters
    ----------
    tensor
        Little-endian, row-major.

    Returns
    -------
    ndarray
        Of the tensor's shape and type, writable.

    Raises
    ------
    ResponseError
        If type, shape and data do not fit together.
    """
    dtype = DTYPES.get(tensor.dtype)
    shape = tuple(tensor.shape)
    if dtype is None or min(shape, default=0) < 0:
        raise exceptions.ResponseError(f"the answer holds a tensor of type {tensor.dtype} and shape {shape}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(tensor.data):
        raise exceptions.ResponseError(
            f"the answer holds {len(tensor.data)} bytes for a tensor of shape {shape}"
        )
    # A copy: an array over the message's own bytes is read-only, which numpy's users do not expect.
    return np.frombuffer(tensor.data, dtype=dtype).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))


def timings(message: common_pb2.Timings) -> types.Timings:
    """Read timings.

    Parameters
    ----------
    message
        Durations.

    Returns
    -------
    Timings
        In seconds.
    """
    return types.Timings(seconds(message.queue), seconds(message.inference))


def seconds(duration: Any) -> float:
    """Read a duration.

    Parameters
    ----------
    duration
        A google.protobuf.Duration.

    Returns
    -------
    float
        In seconds.
    """
    return float(duration.seconds + duration.nanos * 1e-9)


def join_timings(parts: Sequence[types.Timings]) -> types.Timings:
    """Add up the parts of a split batch.

    Parameters
    ----------
    parts
        One a call.

    Returns
    -------
    Timings
        The longest queueing and the sum of inference.
    """
    return types.Timings(max(part.queue for part in parts), sum(part.inference for part in parts))


def one_bundle(bundles: Iterable[str]) -> str:
    """Name the bundle that answered a split batch.

    Parameters
    ----------
    bundles
        One a part; at least one.

    Returns
    -------
    str
        The one of all parts.

    Raises
    ------
    ResponseError
        If the server changed its bundle on the way: parts of the answer would be of another model.
    """
    first, *others = set(bundles)
    if others:
        raise exceptions.ResponseError(
            "the server changed its bundle between the parts of the batch: send it again"
        )
    return first


def sparse(message: common_pb2.SparseFeatures) -> types.SparseFeatures:
    """Read sparse features.

    Parameters
    ----------
    message
        Of one input.

    Returns
    -------
    SparseFeatures
        With as many values as indices.

    Raises
    ------
    ResponseError
        If the counts differ.
    """
    if len(message.indices) != len(message.values):
        raise exceptions.ResponseError(
            f"the answer holds {len(message.indices)} indices for {len(message.values)} activations"
        )
    return types.SparseFeatures(
        message.dictionary,
        np.array(message.indices, dtype=np.int64),
        np.array(message.values, dtype=np.float32),
    )


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
    rows = []
    for response, size in zip(responses, sizes, strict=True):
        block = array(response.embeddings) if embeddings else np.zeros((size, 0), dtype=np.float32)
        if block.ndim != 2 or len(block) != size or len(response.norms) != size:
            raise exceptions.ResponseError(
                f"the answer holds embeddings of shape {list(block.shape)} and {len(response.norms)} norms "
                f"for {size} inputs"
            )
        rows.append(block)
    # Before the rows are joined: those of another bundle may have another length.
    bundle = one_bundle(response.bundle for response in responses)
    return types.EncodeResult(
        embeddings=np.concatenate(rows),
        norms=np.concatenate([np.array(response.norms, dtype=np.float32) for response in responses]),
        features=tuple(sparse(item) for response in responses for item in response.features),
        timings=join_timings([timings(response.timings) for response in responses]),
        bundle=bundle,
    )


NO_EMBEDDING = np.zeros(0, dtype=np.float32)
NO_EMBEDDING.flags.writeable = False


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
    return types.StreamResult(
        id=response.id,
        embedding=array(encoding.embedding) if encoding.HasField("embedding") else NO_EMBEDDING,
        norm=encoding.norm,
        features=sparse(encoding.features) if encoding.HasField("features") else None,
        error=None,
        timings=timings(response.timings),
        bundle=response.bundle,
    )
