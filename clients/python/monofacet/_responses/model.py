"""Answers of ModelService."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from monofacet import _types as types
from monofacet._responses.bias import ablation
from monofacet._responses.encoding import seconds
from monofacet.v1 import model_service_pb2


def model(message: model_service_pb2.Model, server_version: str) -> types.Model:
    """Read the description of a bundle.

    Parameters
    ----------
    message
        Of GetModel or ListModels.
    server_version
        That came with it.

    Returns
    -------
    Model
        Maps and lists as dicts and tuples.
    """
    return types.Model(
        bundle=message.bundle,
        name=message.name,
        description=message.description,
        sha256=message.sha256,
        licences=tuple(message.licences),
        tower=types.Tower(**_plain(message.tower, types.Tower)),
        dictionaries=tuple(_dictionary(item) for item in message.dictionaries),
        runtime=types.Runtime(**_plain(message.runtime, types.Runtime)),
        limits=limits(message.limits),
        metrics=dict(message.metrics),
        files={item.path: item.sha256 for item in message.files},
        server_version=server_version,
        pipeline=types.Pipeline(
            **_plain(message.pipeline, types.Pipeline, skip=("paths",)), paths=tuple(message.pipeline.paths)
        )
        if message.HasField("pipeline")
        else None,
        is_default=message.is_default,
        recommended_ablation=ablation(message.recommended_ablation)
        if message.HasField("recommended_ablation")
        else None,
    )


def limits(message: model_service_pb2.Limits) -> types.Limits:
    """Read the limits.

    Parameters
    ----------
    message
        Of a model.

    Returns
    -------
    Limits
        Sizes in bytes, durations in seconds.
    """
    return types.Limits(
        **_plain(message, types.Limits, skip=("image_formats", "max_call_duration")),
        image_formats=tuple(message.image_formats),
        max_call_duration=seconds(message.max_call_duration),
    )


def _dictionary(message: model_service_pb2.DictionaryInfo) -> types.DictionaryInfo:
    return types.DictionaryInfo(
        **_plain(message, types.DictionaryInfo, skip=("l0", "metrics")),
        l0=message.l0 if message.HasField("l0") else None,
        metrics=dict(message.metrics),
    )


def _plain(message: Message, kind: type[Any], skip: Sequence[str] = ()) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind) if field.name not in skip]
    return {name: getattr(message, name) for name in names}
