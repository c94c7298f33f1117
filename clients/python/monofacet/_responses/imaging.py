"""Answers of ImagingService."""

from __future__ import annotations

from collections.abc import Iterable

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._pictures import decode
from monofacet._responses.encoding import array, sparse, timings
from monofacet._status import error_from_status
from monofacet.v1 import imaging_service_pb2


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
            progress = response.progress
            return types.GenerationProgress(
                tuple(progress.steps), progress.num_inference_steps, progress.waiting
            )
        case "preview":
            preview = response.preview
            return types.GenerationPreview(
                preview.index,
                preview.unsteered,
                preview.step,
                decode(preview.image.data, f"the preview of image {preview.index}"),
            )
        case "image":
            image = response.image
            completed = image.finish_reason == imaging_service_pb2.FINISH_REASON_COMPLETED
            return types.GeneratedImage(
                index=image.index,
                unsteered=image.unsteered,
                seed=image.seed,
                data=image.image.data,
                error=None if completed else error_from_status(image.error),
                delta=image.delta,
                dose=image.dose if image.HasField("dose") else None,
                timings=timings(response.timings),
                bundle=response.bundle,
            )
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


def steering_preview(response: imaging_service_pb2.PreviewSteeringResponse) -> types.SteeringPreview:
    """Read what edits do to an embedding.

    Parameters
    ----------
    response
        Of PreviewSteering.

    Returns
    -------
    SteeringPreview
        With arrays.
    """
    return types.SteeringPreview(
        features=sparse(response.features),
        steered_features=sparse(response.steered_features),
        steered_embedding=array(response.steered_embedding),
        delta=response.delta,
        dose=response.dose if response.HasField("dose") else None,
        captions=tuple(types.NearCaption(c.text, c.similarity) for c in response.captions),
        steered_captions=tuple(types.NearCaption(c.text, c.similarity) for c in response.steered_captions),
        timings=timings(response.timings),
        bundle=response.bundle,
    )


def attributes(response: imaging_service_pb2.ListAttributesResponse) -> types.AttributeList:
    """Read the attributes of a bundle.

    Parameters
    ----------
    response
        Of ListAttributes.

    Returns
    -------
    AttributeList
        In order.
    """
    return types.AttributeList(
        tuple(attribute(card) for card in response.attributes),
        response.unit_dose if response.HasField("unit_dose") else None,
        response.bundle,
    )


def attribute(card: imaging_service_pb2.Attribute) -> types.Attribute:
    """Read the card of an attribute.

    Parameters
    ----------
    card
        Of ListAttributes or GetAttribute.

    Returns
    -------
    Attribute
        With arrays.
    """
    found = card.measures
    measures = types.AttributeMeasures(
        pictures=found.pictures,
        hit=_share(found.hit),
        hit_before=_share(found.hit_before),
        concept_kept=_share(found.concept_kept),
        concept_kept_before=_share(found.concept_kept_before),
        off_distribution=found.off_distribution,
        off_distribution_before=found.off_distribution_before,
    )
    return types.Attribute(
        name=card.name,
        group=card.group,
        features=sparse(card.features),
        dose=card.dose,
        pairs=card.pairs,
        measures=measures if card.HasField("measures") else None,
    )


def _share(share: imaging_service_pb2.AttributeShare) -> types.AttributeShare:
    return types.AttributeShare(share.value, share.low, share.high)
