"""Rows of a modality table as feature cards."""

from __future__ import annotations

import math
from collections.abc import Iterable

from monofacet.v1 import common_pb2
from monofacet.v1 import modality_service_pb2 as pb

from services.modality.label_reasons import DELTA, label_reason
from services.modality.tables import Label, ModalityTable

_PREFIX = "MODALITY_LABEL_"
# In the order of the contract's enum.
LABELS = (Label.IMAGE, Label.TEXT, Label.CROSS, Label.UNRESOLVED, Label.DEAD)


def label_value(label: str) -> common_pb2.ModalityLabel.ValueType:
    """Return the contract's value of a table's label; UNSPECIFIED for an empty one."""
    if not label:
        return common_pb2.MODALITY_LABEL_UNSPECIFIED
    return common_pb2.ModalityLabel.Value(_PREFIX + label)


def label_name(value: common_pb2.ModalityLabel.ValueType) -> str:
    """Return the table's word for a label of the contract."""
    return common_pb2.ModalityLabel.Name(value).removeprefix(_PREFIX)


def card(table: ModalityTable, feature: int, delta: float = DELTA) -> pb.FeatureCard:
    """Return one row as a card; NaN is left unset. `delta` is the one that labels were made with.

    Raises
    ------
    UnknownFeature
        When the dictionary has no such feature.
    """
    row = table.row(feature)
    reason = label_reason(row, delta)
    label, paper_label = label_value(row.pop("label")), label_value(row.pop("paper_label"))
    defined = {k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))}
    return pb.FeatureCard(label=label, paper_label=paper_label, label_reason=reason, **defined)


def cards(table: ModalityTable, features: Iterable[int], delta: float = DELTA) -> list[pb.FeatureCard]:
    """Return the cards of `features`, in that order."""
    return [card(table, int(feature), delta) for feature in features]
