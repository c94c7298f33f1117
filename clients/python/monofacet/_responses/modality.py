"""Answers of ModalityService."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import PIL.Image

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._pictures import decode
from monofacet._responses.encoding import join_timings, one_bundle, timings
from monofacet.v1 import common_pb2, modality_service_pb2

LABELS: dict[int, types.ModalityLabel] = {
    common_pb2.ModalityLabel.Value(f"MODALITY_LABEL_{label.value}"): label for label in types.ModalityLabel
}
CARD_FIELDS = tuple(
    descriptor
    for descriptor in modality_service_pb2.FeatureCard.DESCRIPTOR.fields
    if descriptor.name not in {"label", "paper_label"}
)


def card(message: modality_service_pb2.FeatureCard) -> types.FeatureCard:
    """Read a feature card.

    Parameters
    ----------
    message
        With undefined measures unset.

    Returns
    -------
    FeatureCard
        With None for them.
    """
    values: dict[str, Any] = {
        descriptor.name: getattr(message, descriptor.name)
        if not descriptor.has_presence or message.HasField(descriptor.name)  # type: ignore[arg-type]
        else None
        for descriptor in CARD_FIELDS
    }
    return types.FeatureCard(
        label=_label(message.label), paper_label=LABELS.get(message.paper_label), **values
    )


def _label(value: int) -> types.ModalityLabel:
    label = LABELS.get(value)
    if label is None:
        raise exceptions.ResponseError(f"the answer holds label {value}, which this client does not know")
    return label


def feature_page(response: modality_service_pb2.ListFeaturesResponse) -> types.FeaturePage:
    """Read a page of features.

    Parameters
    ----------
    response
        Of ListFeatures.

    Returns
    -------
    FeaturePage
        In the same order.
    """
    return types.FeaturePage(
        tuple(card(message) for message in response.cards),
        response.total,
        response.next_page_token,
        response.dictionary,
        response.bundle,
    )


def feature_detail(response: modality_service_pb2.GetFeatureResponse) -> types.FeatureDetail:
    """Read a feature with its examples.

    Parameters
    ----------
    response
        Of GetFeature.

    Returns
    -------
    FeatureDetail
        With decoded thumbnails.
    """
    return types.FeatureDetail(
        card=card(response.card),
        images=tuple(
            types.ImageExample(_picture(example), example.caption, example.sample, example.activation)
            for example in response.images
        ),
        texts=tuple(
            types.TextExample(example.text, example.sample, example.activation) for example in response.texts
        ),
        dictionary=response.dictionary,
        bundle=response.bundle,
    )


def _picture(example: modality_service_pb2.ImageExample) -> PIL.Image.Image | None:
    if not example.HasField("thumbnail"):
        return None
    return decode(example.thumbnail.data, f"the thumbnail of {example.sample!r}")


def classification(
    responses: Sequence[modality_service_pb2.ClassifyModalityResponse], sizes: Sequence[int]
) -> types.ClassificationResult:
    """Read the answers to the parts of a batch.

    Parameters
    ----------
    responses
        One a part, in order; at least one.
    sizes
        Inputs of each part.

    Returns
    -------
    ClassificationResult
        Of the whole batch.

    Raises
    ------
    ResponseError
        If an answer does not hold one classification an input, or the server changed its bundle on the way.
    """
    for response, size in zip(responses, sizes, strict=True):
        if len(response.classifications) != size:
            raise exceptions.ResponseError(
                f"the answer holds {len(response.classifications)} classifications for {size} inputs"
            )
    return types.ClassificationResult(
        tuple(_classification(item) for response in responses for item in response.classifications),
        responses[0].dictionary,
        join_timings([timings(response.timings) for response in responses]),
        one_bundle(response.bundle for response in responses),
    )


def _classification(message: modality_service_pb2.ModalityClassification) -> types.ModalityClassification:
    return types.ModalityClassification(
        shares=dict.fromkeys(types.ModalityLabel, 0.0)
        | {_label(item.label): item.share for item in message.shares},
        dominant_label=LABELS.get(message.dominant_label),
        top_features=tuple(
            types.ActiveFeature(item.feature, item.activation, item.share, _label(item.label), item.name)
            for item in message.top_features
        ),
        active_features=message.active_features,
    )


def modality_table(response: modality_service_pb2.ScoreModalityResponse) -> types.ModalityTable:
    """Read the table of ScoreModality.

    Parameters
    ----------
    response
        With the settings as used.

    Returns
    -------
    ModalityTable
        One card a feature.
    """
    used = {
        field.name: getattr(response.settings, field.name)
        for field in dataclasses.fields(types.ScoreSettings)
    }
    return types.ModalityTable(
        tuple(card(message) for message in response.cards),
        response.pairs,
        types.ScoreSettings(**used),
        timings(response.timings),
        response.bundle,
    )
