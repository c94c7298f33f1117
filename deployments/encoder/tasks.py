"""What the gateway and the encoder say to each other.

Plain data, because every object is pickled on the way: raw bytes in, numpy arrays out, one message for
everything that waited together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deployments.batching import BatchRecord
from services.bias.leace import Leace
from services.errors import InvalidInput
from services.modality.modalities import Modality


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One call's inputs, or one item of a stream.

    Attributes
    ----------
    items
        Encoded image files (bytes) and texts (str), in any order.
    dictionary
        Name of the dictionary whose features are wanted; None for embeddings only.
    max_features
        Keep so many features an item, those with the largest activations; None keeps all active ones.
    truncate_text
        Cut texts at the context length instead of refusing them.
    passes
        0 to encode the images. 1 to tell their noise, too, which is cheap. 2 to encode them smoothed besides, for a
        second forward.
    each
        A bad item is an answer of its own (`Encoded.failed`) and not the end of the others, as in a stream.
    stream
        Name of the stream that the work is an item of; empty for a call of its own. All items of a stream share
        one request's part of the model.
    caller
        Whose call it is; callers share the model evenly.
    """

    items: tuple[bytes | str, ...]
    dictionary: str | None = None
    max_features: int | None = None
    truncate_text: bool = False
    passes: int = 0
    each: bool = False
    stream: str = ""
    caller: str = ""


@dataclass(frozen=True, slots=True)
class Features:
    """The active features of one item, largest activation first.

    Attributes
    ----------
    indices
        int32, shape (nnz,).
    values
        float32, shape (nnz,).
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]


class TravelsAlone(Exception):
    """The work takes long to decode, and the others of its message would wait: to be sent in a message of its own."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The answer to one `EncodeTask`.

    Attributes
    ----------
    unit
        Embeddings of length 1, float32, shape (items, embed_dim).
    norm
        Their lengths before, float32, shape (items,).
    features
        One an item, or empty when no dictionary was asked for.
    queue_s, inference_s
        Seconds waited for the model, and seconds of decoding and of the batches that held the items.
    decode_s
        The part of `inference_s` that was decoding: from the arrival of the message to its last item's array.
    noise
        How noisy each image is, in pixel levels (`services.defense.smoothing.noise`), float32, shape (items,); 0 for
        a text, and empty where no look was asked for.
    smoothed
        The same of the smoothed images (a text stays as it is); None where no second pass was asked for.
    failed
        What is wrong with each bad item, by its place in the work, where each is an answer of its own. The other fields
        then hold the other items alone.
    """

    unit: NDArray[np.float32]
    norm: NDArray[np.float32]
    features: tuple[Features, ...] = ()
    queue_s: float = 0.0
    inference_s: float = 0.0
    noise: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    smoothed: Encoded | None = None
    failed: Mapping[int, InvalidInput] = field(default_factory=dict)
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers to one message, in order, and the forwards run since the last reply.

    Attributes
    ----------
    answers
        `Encoded`, or the exception that the work met. Field paths of an InvalidInput start at the item:
        `[2].image.data`.
    records
        Each forward is reported exactly once, also one whose callers have gone.
    replica
        Who answers: a name that no other replica has.
    """

    answers: tuple[Encoded | Exception, ...]
    records: tuple[BatchRecord, ...] = field(default=())
    replica: str = ""


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an encoder runs on, and the shape of its towers.

    Attributes
    ----------
    backend, device, precision, threads
        As in the contract's `Runtime`.
    embed_dim, image_size, context_length, logit_scale, parameters
        As in the contract's `Tower`; sizes in elements, pixels and tokens.
    """

    backend: str
    device: str
    precision: str
    threads: int
    embed_dim: int
    image_size: int
    context_length: int
    logit_scale: float
    parameters: int


class ReplicaFaulty(Exception):
    """The replica has no model, so another one has to answer."""


@dataclass(frozen=True, slots=True)
class EncoderFault:
    """Why an encoder could not be warmed: the kind of the error and its first line."""

    why: str


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Pairs to score, as the features of their two sides.

    Attributes
    ----------
    dictionary
        Name of the dictionary that the features belong to.
    images, texts
        Active features of the two sides, pair by pair.
    groups
        Name of each pair's group; empty for a pair that is a group of its own.
    delta, bootstrap_samples, shuffles, false_discovery_rate, seed
        As in the contract's `ScoreSettings`, every one set.
    remaining_s
        Seconds until the caller's deadline; None for none.
    caller
        As in `EncodeTask`.
    """

    dictionary: str
    images: tuple[Features, ...]
    texts: tuple[Features, ...]
    groups: tuple[str, ...]
    delta: float = 0.25
    bootstrap_samples: int = 1_000
    shuffles: int = 1_000
    false_discovery_rate: float = 0.05
    seed: int = 0
    remaining_s: float | None = None
    caller: str = ""


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """Labelled items, and the ablations to audit on them.

    Attributes
    ----------
    dictionary
        Name of the dictionary that the features belong to.
    unit
        Embeddings of length 1, float32, shape (items, embed_dim).
    features
        Active features, item by item.
    is_text, gender
        As in `services.bias.Cases`.
    profession, cluster
        Names, item by item; an item with an empty cluster stands alone.
    direction
        t_F - t_M, float32, shape (embed_dim,).
    means
        Mean activation of each feature, by modality.
    plans
        Mode and features (None for LEACE) of each ablation.
    leace
        Erasers, by modality.
    logit_scale, bootstrap_samples, null_sets, min_group, seed
        As in the contract's `AuditSettings`, every one set.
    remaining_s
        Seconds until the caller's deadline; None for none.
    caller
        As in `EncodeTask`.
    """

    dictionary: str
    unit: NDArray[np.float32]
    features: tuple[Features, ...]
    is_text: NDArray[np.bool_]
    gender: NDArray[np.int64]
    profession: tuple[str, ...]
    cluster: tuple[str, ...]
    direction: NDArray[np.float32]
    means: Mapping[Modality, NDArray[np.float32]]
    plans: tuple[tuple[str, NDArray[np.int64] | None], ...]
    leace: Mapping[Modality, Leace]
    logit_scale: float
    bootstrap_samples: int
    null_sets: int
    min_group: int
    seed: int
    remaining_s: float | None = None
    caller: str = ""
