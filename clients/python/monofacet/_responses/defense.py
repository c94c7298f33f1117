"""Answers of DefenseService."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TypeVar

from monofacet import _exceptions as exceptions
from monofacet import _types as types
from monofacet._responses.encoding import array, join_timings, one_bundle, timings
from monofacet._responses.modality import LABELS
from monofacet.v1 import defense_service_pb2

Word = TypeVar("Word", bound=enum.StrEnum)


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
    images: list[types.FilteredImage] = []
    for response, size in zip(responses, sizes, strict=True):
        before, after = array(response.embeddings_before), array(response.embeddings_after)
        if not len(response.images) == len(before) == len(after) == size or before.shape != after.shape:
            raise exceptions.ResponseError(
                f"the answer holds {len(response.images)} verdicts and embeddings of shapes {list(before.shape)} "
                f"and {list(after.shape)} for {size} images"
            )
        images += [_image(message, before[i], after[i]) for i, message in enumerate(response.images)]
    first = responses[0]
    return types.FilterResult(
        images=tuple(images),
        false_positive_rate=first.false_positive_rate,
        mode=_word(types.FilterMode, defense_service_pb2.FilterMode.Name(first.mode), "FILTER_MODE_"),
        keep_residual=first.keep_residual,
        dictionary=first.dictionary,
        timings=join_timings([timings(response.timings) for response in responses]),
        bundle=one_bundle(response.bundle for response in responses),
    )


def _image(
    message: defense_service_pb2.FilteredImage, before: types.Floats, after: types.Floats
) -> types.FilteredImage:
    scores = message.scores
    return types.FilteredImage(
        verdict=_word(types.Verdict, defense_service_pb2.Verdict.Name(message.verdict), "VERDICT_"),
        score=message.score,
        threshold=message.threshold,
        p_value=message.p_value,
        scores=types.DetectionScores(
            scores.reconstruction_error,
            scores.text_share,
            scores.moved_share,
            scores.noise,
            scores.instability if scores.HasField("instability") else None,
        ),
        features=tuple(_feature(item) for item in message.features),
        suspicious_features=message.suspicious_features,
        filtered=message.filtered,
        before=before,
        after=after,
        label_before=_label(message.label_before),
        label_after=_label(message.label_after),
    )


def _feature(message: defense_service_pb2.SuspiciousFeature) -> types.SuspiciousFeature:
    return types.SuspiciousFeature(
        message.feature,
        message.activation,
        message.filtered,
        tuple(
            _word(
                types.SuspicionReason,
                defense_service_pb2.SuspicionReason.Name(reason),
                "SUSPICION_REASON_",
            )
            for reason in message.reasons
        ),
        LABELS.get(message.label),
        message.name,
    )


def _label(message: defense_service_pb2.ZeroShotLabel) -> types.ZeroShotLabel:
    return types.ZeroShotLabel(message.text, message.index, message.probability, message.similarity)


def _word(kind: type[Word], name: str, prefix: str) -> Word:
    try:
        return kind(name.removeprefix(prefix))
    except ValueError as error:
        raise exceptions.ResponseError(f"the answer holds {name}, which this client does not know") from error
