"""What the client returns: small frozen dataclasses over numpy arrays and PIL images."""

from monofacet._types.encoding import EncodeResult, Floats, SparseFeatures, StreamResult, Timings
from monofacet._types.modality import (
    ActiveFeature,
    ClassificationResult,
    FeatureCard,
    FeatureDetail,
    FeatureOrder,
    FeaturePage,
    FeatureQuery,
    ImageExample,
    ModalityClassification,
    ModalityLabel,
    ModalityTable,
    ScoreSettings,
    TextExample,
)
from monofacet._types.model import DictionaryInfo, Limits, Model, Runtime, Tower

__all__ = [
    "ActiveFeature",
    "ClassificationResult",
    "DictionaryInfo",
    "EncodeResult",
    "FeatureCard",
    "FeatureDetail",
    "FeatureOrder",
    "FeaturePage",
    "FeatureQuery",
    "Floats",
    "ImageExample",
    "Limits",
    "ModalityClassification",
    "ModalityLabel",
    "ModalityTable",
    "Model",
    "Runtime",
    "ScoreSettings",
    "SparseFeatures",
    "StreamResult",
    "TextExample",
    "Timings",
    "Tower",
]
