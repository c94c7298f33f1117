"""Attributes of a bundle as messages of the contract."""

from __future__ import annotations

import numpy as np
from monofacet.v1 import imaging_service_pb2 as pb

from deployments.encoder.tasks import Features
from deployments.gateway.messages import sparse
from services.imaging.dose import Attribute, Attributes, Share


def attribute(known: Attributes, name: str) -> pb.Attribute:
    """Return the card of an attribute.

    Raises
    ------
    UnknownAttribute
        Where there is none of that name.
    """
    found = known.attribute(name, known.config.dictionary)
    entry = found.entry
    card = pb.Attribute(
        name=entry.name,
        group=entry.group,
        features=sparse(known.config.dictionary, _features(found)),
        dose=entry.dose,
        pairs=entry.pairs,
    )
    measured = entry.measures
    if measured is not None:
        card.measures.CopyFrom(
            pb.AttributeMeasures(
                pictures=measured.pictures,
                hit=_share(measured.hit),
                hit_before=_share(measured.hit_before),
                concept_kept=_share(measured.kept),
                concept_kept_before=_share(measured.kept_before),
                off_distribution=measured.off_distribution,
                off_distribution_before=measured.off_distribution_before,
            )
        )
    return card


def _features(found: Attribute) -> Features:
    order = np.argsort(-np.abs(found.values), kind="stable")
    return Features(found.ids[order].astype(np.int32), found.values[order])


def _share(share: Share) -> pb.AttributeShare:
    return pb.AttributeShare(value=share.value, low=share.low, high=share.high)
