"""Client of Monofacet: embeddings, sparse features and modality of images and texts.

>>> import monofacet
>>> with monofacet.Client("localhost:9000") as client:  # doctest: +SKIP
...     client.encode(["a red heart"]).embeddings

`Client` blocks, `AsyncClient` awaits; both have the same calls. Everything that they raise is a
`MonofacetError`:

::

    MonofacetError
    |-- InputError
    |-- ResponseError
    |-- ClosedError
    `-- CallError
        |-- InvalidInputError
        |-- NotFoundError
        |-- AuthenticationError
        |-- OverloadedError
        |-- UnavailableError
        |-- DeadlineError
        |-- CallCancelledError
        |-- UnsupportedError
        `-- ServerError
"""

from monofacet._async_client import AsyncClient
from monofacet._bias_requests import LabelledItem
from monofacet._client import Client
from monofacet._config import TLS, Retry, Timeout
from monofacet._exceptions import (
    AuthenticationError,
    CallCancelledError,
    CallError,
    ClosedError,
    DeadlineError,
    InputError,
    InvalidInputError,
    MonofacetError,
    NotFoundError,
    OverloadedError,
    ResponseError,
    ServerError,
    UnavailableError,
    UnsupportedError,
    Violation,
)
from monofacet._inputs import Image, Input, Pair
from monofacet._types import (
    Ablation,
    AblationAudit,
    AblationMode,
    ActiveFeature,
    Attribute,
    AttributeList,
    AttributeMeasures,
    AttributeShare,
    AuditResult,
    AuditSettings,
    AuditVerdict,
    Change,
    ClassificationResult,
    DetectionScores,
    DictionaryInfo,
    EncodeResult,
    Estimate,
    FeatureCard,
    FeatureDetail,
    FeatureOrder,
    FeaturePage,
    FeatureQuery,
    FilteredImage,
    FilterMode,
    FilterResult,
    Gender,
    GenderClassification,
    GenderMeasures,
    GenderResult,
    GenderScore,
    GeneratedImage,
    GenerateOptions,
    GenerationEvent,
    GenerationPreview,
    GenerationProgress,
    GenerationResult,
    ImageExample,
    Limits,
    ModalityClassification,
    ModalityLabel,
    ModalityTable,
    Model,
    NearCaption,
    NullTest,
    Pipeline,
    ProfessionAudit,
    Runtime,
    ScoreSettings,
    SkippedItem,
    SparseFeatures,
    SteeringAttribute,
    SteeringEdit,
    SteeringPreview,
    StreamResult,
    SuspicionReason,
    SuspiciousFeature,
    TextExample,
    Timings,
    Tower,
    Verdict,
    ZeroShotLabel,
)
from monofacet._version import __version__

__all__ = [
    "Attribute",
    "AttributeList",
    "AttributeMeasures",
    "AttributeShare",
    "Ablation",
    "AblationAudit",
    "AblationMode",
    "ActiveFeature",
    "AsyncClient",
    "AuditResult",
    "AuditSettings",
    "AuditVerdict",
    "AuthenticationError",
    "CallCancelledError",
    "CallError",
    "Change",
    "ClassificationResult",
    "Client",
    "ClosedError",
    "DeadlineError",
    "DetectionScores",
    "DictionaryInfo",
    "EncodeResult",
    "Estimate",
    "FeatureCard",
    "FeatureDetail",
    "FeatureOrder",
    "FeaturePage",
    "FeatureQuery",
    "FilterMode",
    "FilterResult",
    "FilteredImage",
    "Gender",
    "GenderClassification",
    "GenderMeasures",
    "GenderResult",
    "GenderScore",
    "GenerateOptions",
    "GeneratedImage",
    "GenerationEvent",
    "GenerationPreview",
    "GenerationProgress",
    "GenerationResult",
    "Image",
    "ImageExample",
    "Input",
    "InputError",
    "InvalidInputError",
    "LabelledItem",
    "Limits",
    "ModalityClassification",
    "ModalityLabel",
    "ModalityTable",
    "Model",
    "MonofacetError",
    "NearCaption",
    "NotFoundError",
    "NullTest",
    "OverloadedError",
    "Pair",
    "Pipeline",
    "ProfessionAudit",
    "ResponseError",
    "Retry",
    "Runtime",
    "ScoreSettings",
    "ServerError",
    "SkippedItem",
    "SparseFeatures",
    "SteeringAttribute",
    "SteeringEdit",
    "SteeringPreview",
    "StreamResult",
    "SuspicionReason",
    "SuspiciousFeature",
    "TLS",
    "TextExample",
    "Timeout",
    "Timings",
    "Tower",
    "UnavailableError",
    "UnsupportedError",
    "Verdict",
    "Violation",
    "ZeroShotLabel",
    "__version__",
]
