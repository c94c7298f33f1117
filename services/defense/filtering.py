"""Filtering: other activations for suspicious features, decoded and normalised again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float

from services.defense.features import Look, Reason, Suspects
from services.defense.scores import decode


class FilterMode(StrEnum):
    """What becomes of suspicious features."""

    DROP = "DROP"
    KEEP_NORMAL = "KEEP_NORMAL"
    RESTORE = "RESTORE"


@dataclass(frozen=True)
class FilterChoice:
    """How to filter: what becomes of suspicious features, and whether what no feature explains is kept."""

    mode: FilterMode
    keep_residual: bool


_DROPPED = (Reason.MOVED, Reason.TEXT, Reason.UNSTABLE)
_ABNORMAL = (Reason.UNSEEN, Reason.EXCESS)


def drop(found: Suspects) -> Float[np.ndarray, "*batch m"]:
    """Return z' = 0 where an attack is known to move a feature, where it is TEXT and where it is unstable, else z."""
    suspicious = np.logical_or.reduce([found.reasons[reason] for reason in _DROPPED])
    return np.where(suspicious, np.float32(0), found.values)


def keep_normal(found: Suspects) -> Float[np.ndarray, "*batch m"]:
    """Return z' = z where a feature is normal under clean statistics, else 0."""
    abnormal = np.logical_or.reduce([found.reasons[reason] for reason in _ABNORMAL])
    return np.where(abnormal, np.float32(0), found.values)


def restore(found: Suspects) -> Float[np.ndarray, "*batch m"]:
    """Return z' = z~, the smoothed picture's activation, where a feature is unstable, else z."""
    return np.where(found.reasons[Reason.UNSTABLE], found.smoothed, found.values)


MODES = {FilterMode.DROP: drop, FilterMode.KEEP_NORMAL: keep_normal, FilterMode.RESTORE: restore}


def rebuild(
    look: Look,
    smoothed: Look | None,
    found: Suspects,
    filtered: Float[np.ndarray, "*batch m"],
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
    choice: FilterChoice,
) -> Float[np.ndarray, "*batch d"]:
    """Return the embeddings of activations z', of unit length.

    e' = norm(z' D + b), and with the residual e' = norm(e + (z' - z) D): what no feature explains is then kept. Where
    activations are restored it is the smoothed picture's residual, e' = norm(e~ + (z' - z~) D), because the attack is
    in the other one. An embedding of which nothing is left is returned as it was: a direction that means nothing is
    worse.
    """
    if choice.keep_residual and choice.mode is FilterMode.RESTORE and smoothed is not None:
        raw = smoothed.unit + (filtered - found.smoothed) @ rows[found.indices]
    elif choice.keep_residual:
        raw = look.unit + (filtered - found.values) @ rows[found.indices]
    else:
        raw = decode(found.indices, filtered, rows, origin)
    length = np.linalg.norm(raw, axis=-1, keepdims=True)
    result: np.ndarray = np.where(length > 1e-6, raw / np.maximum(length, 1e-6), look.unit)
    return result.astype(np.float32)
