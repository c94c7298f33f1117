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
from monofacet._client import Client
from monofacet._config import TLS, Retry, Timeout
from monofacet._exceptions import (
    AuthenticationError,
    CallCancelledError,
    CallError,
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
    ActiveFeature,
    ClassificationResult,
    DetectionScores,
    DictionaryInfo,
    EncodeResult,
    FeatureCard,
    FeatureDetail,
    FeatureOrder,
    FeaturePage,
    FeatureQuery,
    FilteredImage,
    FilterMode,
    FilterResult,
    ImageExample,
    Limits,
    ModalityClassification,
    ModalityLabel,
    ModalityTable,
    Model,
    Runtime,
    ScoreSettings,
    SparseFeatures,
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
    "DetectionScores",
    "FilterMode",
    "FilterResult",
    "FilteredImage",
    "SuspiciousFeature",
    "SuspicionReason",
    "Verdict",
    "ZeroShotLabel",
    "ActiveFeature",
    "AsyncClient",
    "AuthenticationError",
    "CallCancelledError",
    "CallError",
    "ClassificationResult",
    "Client",
    "DeadlineError",
    "DictionaryInfo",
    "EncodeResult",
    "FeatureCard",
    "FeatureDetail",
    "FeatureOrder",
    "FeaturePage",
    "FeatureQuery",
    "Image",
    "ImageExample",
    "Input",
    "InputError",
    "InvalidInputError",
    "Limits",
    "ModalityClassification",
    "ModalityLabel",
    "ModalityTable",
    "Model",
    "MonofacetError",
    "NotFoundError",
    "OverloadedError",
    "Pair",
    "ResponseError",
    "Retry",
    "Runtime",
    "ScoreSettings",
    "ServerError",
    "SparseFeatures",
    "StreamResult",
    "TLS",
    "TextExample",
    "Timeout",
    "Timings",
    "Tower",
    "UnavailableError",
    "UnsupportedError",
    "Violation",
    "__version__",
]
