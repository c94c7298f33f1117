"""From the contract's answers to arrays, images and dataclasses. Pure: no channel is touched."""

from monofacet._responses.defense import filtered
from monofacet._responses.encoding import array, bad_item, encode, stream_encode
from monofacet._responses.modality import classification, feature_detail, feature_page, modality_table
from monofacet._responses.model import limits, model

__all__ = [
    "filtered",
    "array",
    "bad_item",
    "classification",
    "encode",
    "feature_detail",
    "feature_page",
    "limits",
    "modality_table",
    "model",
    "stream_encode",
]
