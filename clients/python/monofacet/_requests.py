"""From Python values to the contract's requests. Pure: no channel is touched."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet._convert import prefix
from monofacet._inputs import Input, sendable, to_input
from monofacet._types import FeatureQuery, ModalityLabel
from monofacet.v1 import common_pb2, feature_service_pb2, modality_service_pb2

DEFAULT_PAGE_SIZE = 200


@sendable("the options")
def encode_options(
    dictionary: str | None, max_features: int | None, truncate: bool, embeddings: bool
) -> feature_service_pb2.EncodeOptions:
    """Make the options of Encode and StreamEncode.

    Parameters
    ----------
    dictionary
        None for no features, an empty string for the default dictionary.
    max_features
        Features kept an input, or None for all active ones.
    truncate
        Whether long texts are cut.
    embeddings
        Whether embeddings are returned.

    Returns
    -------
    EncodeOptions
        What is None stays unset.

    Raises
    ------
    InputError
        If an option cannot be sent.
    """
    options = feature_service_pb2.EncodeOptions(truncate_text=truncate)
    if dictionary is not None:
        options.dictionary = dictionary
    if max_features is not None:
        options.max_features = _unsigned("max_features", max_features)
    if not embeddings:
        options.include_embeddings = False
    return options


def encode(
    inputs: Sequence[common_pb2.Input], options: feature_service_pb2.EncodeOptions
) -> feature_service_pb2.EncodeRequest:
    """Make an Encode request.

    Parameters
    ----------
    inputs
        A part of the batch.
    options
        The same for all parts.

    Returns
    -------
    EncodeRequest
        For one call.
    """
    return feature_service_pb2.EncodeRequest(inputs=inputs, options=options)


def stream_item(position: int, value: Input | tuple[str, Input]) -> tuple[str, Input]:
    """Find the id of an item of a stream.

    Parameters
    ----------
    position
        Of the item, from 0: its id if it has none of its own.
    value
        An input, or a pair of id and input.

    Returns
    -------
    tuple
        Id and input.
    """
    # A tuple of another length is no pair, and as an input it is refused in its place.
    if isinstance(value, tuple) and len(value) == 2:
        name, item = value
        return str(name), item
    return str(position), value


@sendable("the item")
def stream_encode(name: str, value: Input) -> feature_service_pb2.StreamEncodeRequest:
    """Make the message for one item of a stream.

    Parameters
    ----------
    name
        The item's id.
    value
        The text or image.

    Returns
    -------
    StreamEncodeRequest
        With the item set.

    Raises
    ------
    InputError
        If the id or the value cannot be sent.
    """
    return feature_service_pb2.StreamEncodeRequest(
        item=feature_service_pb2.StreamItem(id=name, input=to_input(value))
    )


@sendable("the limit")
def limit(features: int | None) -> float:
    """Check how many features are asked for.

    Parameters
    ----------
    features
        None for all.

    Returns
    -------
    float
        Infinite for all.

    Raises
    ------
    InputError
        If it is no count.
    """
    return math.inf if features is None else _unsigned("limit", features)


@sendable("the query")
def list_features(
    query: FeatureQuery, page_size: int, page_token: str
) -> modality_service_pb2.ListFeaturesRequest:
    """Make a ListFeatures request.

    Parameters
    ----------
    query
        Which features, and in which order.
    page_size
        Features a page.
    page_token
        Of the page before, or empty.

    Returns
    -------
    ListFeaturesRequest
        For one page.

    Raises
    ------
    InputError
        If a label, the order or a condition is none of the contract's, or cannot be sent.
    """
    unknown = set(query) - FeatureQuery.__annotations__.keys()
    if unknown:
        raise exceptions.InputError(f"features cannot be asked for by {', '.join(sorted(unknown))}")
    feature_filter = modality_service_pb2.FeatureFilter(name_contains=query.get("name_contains", ""))
    labels = query.get("labels", ())
    for label in [labels] if isinstance(labels, str) else labels:
        feature_filter.labels.append(label_value(label))
    conditions = ("min_mds", "max_mds", "min_firing_rate", "max_firing_rate", "coactivation_significant")
    set_given(feature_filter, {field: query.get(field) for field in conditions})
    order_by = query.get("order_by", "feature")
    try:
        order = modality_service_pb2.FeatureOrder.Value(f"FEATURE_ORDER_{str(order_by).upper()}")
    except ValueError as error:
        raise exceptions.InputError(f"features cannot be ordered by {order_by!r}") from error
    return modality_service_pb2.ListFeaturesRequest(
        dictionary=query.get("dictionary", ""),
        filter=feature_filter,
        order_by=order,
        descending=query.get("descending", False),
        page_size=_unsigned("page_size", page_size),
        page_token=page_token,
    )


@sendable("the request")
def get_feature(
    feature: int, dictionary: str, max_images: int | None, max_texts: int | None
) -> modality_service_pb2.GetFeatureRequest:
    """Make a GetFeature request.

    Parameters
    ----------
    feature
        Feature id.
    dictionary
        Its dictionary; empty for the default one.
    max_images, max_texts
        At most so many, or None for all.

    Returns
    -------
    GetFeatureRequest
        For one call.

    Raises
    ------
    InputError
        If a number or the name cannot be sent.
    """
    request = modality_service_pb2.GetFeatureRequest(
        dictionary=dictionary, feature=_unsigned("feature", feature)
    )
    if max_images is not None:
        request.max_images = _unsigned("max_images", max_images)
    if max_texts is not None:
        request.max_texts = _unsigned("max_texts", max_texts)
    return request


@sendable("the request")
def classify_modality(
    inputs: Sequence[common_pb2.Input], dictionary: str, truncate: bool, top_features: int
) -> modality_service_pb2.ClassifyModalityRequest:
    """Make a ClassifyModality request.

    Parameters
    ----------
    inputs
        A part of the batch.
    dictionary
        Its name; empty for the default one.
    truncate
        Whether long texts are cut.
    top_features
        Features listed an input.

    Returns
    -------
    ClassifyModalityRequest
        For one call.

    Raises
    ------
    InputError
        If the number or the name cannot be sent.
    """
    return modality_service_pb2.ClassifyModalityRequest(
        inputs=inputs,
        dictionary=dictionary,
        truncate_text=truncate,
        top_features=_unsigned("top_features", top_features),
    )


def label_value(label: ModalityLabel | str) -> Any:
    """Find the contract's value of a label; see `enum_value`."""
    return enum_value(ModalityLabel, common_pb2.ModalityLabel.DESCRIPTOR, label, "label")


def enum_value(kind: type[enum.StrEnum], values: EnumDescriptor, said: object, what: str) -> Any:
    """Find the contract's value of a word.

    Parameters
    ----------
    kind
        The words that there are.
    values
        Of the contract: the same, with a prefix.
    said
        A word in any case.
    what
        What the words are, for the error.

    Returns
    -------
    int
        Never UNSPECIFIED; mypy takes it for a value of any enum.

    Raises
    ------
    InputError
        If there is no such word.
    """
    try:
        word = kind(str(said).upper())
    except ValueError as error:
        raise exceptions.InputError(f"{said!r} is no {what}: choose from {', '.join(kind)}") from error
    return values.values_by_name[prefix(values) + word].number


def settings_given(settings: Any, *others: str) -> dict[str, object]:
    """Return the settings of a dataclass by the names of their fields, without `others`; for `set_given`."""
    names = [field.name for field in dataclasses.fields(settings) if field.name not in others]
    return {name: getattr(settings, name) for name in names}


def set_given(message: Message, values: Mapping[str, object]) -> None:
    """Set the fields that were given.

    Parameters
    ----------
    message
        To be changed.
    values
        By field; what is None stays unset.

    Raises
    ------
    InputError
        If a value does not fit its field; the message says which.
    """
    for field, value in values.items():
        if value is not None:
            with sendable(field):
                setattr(message, field, value)


def _unsigned(name: str, value: int) -> int:
    with sendable(name):
        if not 0 <= value < 2**32:
            raise exceptions.InputError(f"{name} is a number from 0 to {2**32 - 1}, not {value}")
    return value
