"""An audit on its way from the gateway to the encoder; apart from what computes it, which needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.encoder.tasks import Features
from services.bias.leace import Leace
from services.modality.modalities import Modality


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
        As in `deployments.encoder.tasks.Work`.
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
