"""What is known of each feature on clean images, and why a feature of an image is suspicious."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Int

# A feature that fires on fewer clean images than this is unseen.
RARE = 0.001
# The quantile of clean activations beyond which one is excessive.
EXCESS = 0.999


class Reason(StrEnum):
    """Why a feature is suspicious."""

    UNSEEN = "UNSEEN"
    EXCESS = "EXCESS"
    MOVED = "MOVED"
    TEXT = "TEXT"
    UNSTABLE = "UNSTABLE"


@dataclass(frozen=True)
class Look:
    """One look at a picture, or at several of a batch.

    Attributes
    ----------
    unit : float32 array, shape (*batch, d)
        e, of unit length.
    indices : int array, shape (nnz,)
        Active features, in any order; of a batch, those that are active in any of it.
    values : float32 array, shape (*batch, nnz)
        Their activations z.
    """

    unit: Float[np.ndarray, "*batch d"]
    indices: Int[np.ndarray, " nnz"]
    values: Float[np.ndarray, "*batch nnz"]

    @classmethod
    def stack(cls, looks: Sequence[Look]) -> Look:
        """Return the looks at several pictures as one."""
        indices = np.concatenate([look.indices for look in looks])
        indices, columns = np.unique(indices, return_inverse=True)
        values = np.zeros((len(looks), len(indices)), np.float32)
        rows = np.repeat(np.arange(len(looks)), [len(look.indices) for look in looks])
        values[rows, columns.reshape(-1)] = np.concatenate([look.values for look in looks])
        return cls(np.stack([look.unit for look in looks]), indices, values)

    def energy(self) -> Float[np.ndarray, "*batch nnz"]:
        """Return z_j^2 / sum z^2, the share of the energy on each active feature; 0 where nothing is active."""
        squares = self.values.astype(np.float64) ** 2
        total = squares.sum(-1, keepdims=True)
        shares: np.ndarray = squares / np.where(total > 0, total, 1.0)
        return shares


@dataclass(frozen=True)
class FeatureStatistics:
    """One row a feature of the dictionary, from clean images and from one attack.

    Attributes
    ----------
    firing_rate : float32 array, shape (n,)
        Share of clean images that activate it.
    upper : float32 array, shape (n,)
        The `EXCESS` quantile of its activation over clean images, zeros included.
    moved : bool array, shape (n,)
        Whether the attack of the calibration raises its energy significantly.
    text : bool array, shape (n,)
        Whether its modality label is TEXT.
    tolerance : float
        How far smoothing changes an activation on a clean image: the 0.99 quantile over active features.
    """

    firing_rate: Float[np.ndarray, " n"]
    upper: Float[np.ndarray, " n"]
    moved: Bool[np.ndarray, " n"]
    text: Bool[np.ndarray, " n"]
    tolerance: float

    @classmethod
    def measure(
        cls,
        clean: Float[np.ndarray, "images n"],
        attacked: tuple[Float[np.ndarray, "pairs n"], Float[np.ndarray, "pairs n"]],
        smoothed: tuple[Float[np.ndarray, "pairs n"], Float[np.ndarray, "pairs n"]],
        text: Bool[np.ndarray, " n"],
    ) -> FeatureStatistics:
        """Measure the statistics.

        Parameters
        ----------
        clean : float32 array
            Activations of clean images.
        attacked : (before, after)
            Activations of the same images before and after an attack.
        smoothed : (as they are, smoothed)
            Activations of the same clean images.
        text : bool array
            Features labelled TEXT.
        """
        return cls(
            firing_rate=(clean > 0).mean(0).astype(np.float32),
            upper=np.quantile(clean, EXCESS, axis=0).astype(np.float32),
            moved=moved_features(*attacked),
            text=text,
            tolerance=change_tolerance(*smoothed),
        )


def moved_features(
    before: Float[np.ndarray, "pairs n"], after: Float[np.ndarray, "pairs n"], z_score: float = 2.0
) -> Bool[np.ndarray, " n"]:
    """Return where the energy z_j^2 rises by more than `z_score` standard errors of its mean over pairs."""
    rise = after.astype(np.float64) ** 2 - before.astype(np.float64) ** 2
    error = rise.std(0, ddof=1) / np.sqrt(len(rise))
    result: np.ndarray = (rise.mean(0) > z_score * error) & (error > 0)
    return result


def change_tolerance(
    z: Float[np.ndarray, "images n"], smoothed: Float[np.ndarray, "images n"], level: float = 0.99
) -> float:
    """Return the `level` quantile of |z_j - z~_j| over the features active in either look at clean images."""
    active = (z > 0) | (smoothed > 0)
    return float(np.quantile(np.abs(z - smoothed)[active], level)) if active.any() else 0.0


@dataclass(frozen=True)
class Suspects:
    """The features of images, those of their smoothed pictures included, and what speaks against each.

    Attributes
    ----------
    indices : int array, shape (m,)
        Features active in any look, ascending.
    values, smoothed : float32 arrays, shape (*batch, m)
        Activations z, and z~ of the smoothed picture (a copy of z without one).
    reasons : mapping of Reason to bool array, shape (*batch, m)
        Which features each reason holds for.
    """

    indices: Int[np.ndarray, " m"]
    values: Float[np.ndarray, "*batch m"]
    smoothed: Float[np.ndarray, "*batch m"]
    reasons: dict[Reason, Bool[np.ndarray, "*batch m"]]

    @property
    def any(self) -> Bool[np.ndarray, "*batch m"]:
        """Which features have at least one reason."""
        result: np.ndarray = np.logical_or.reduce(list(self.reasons.values()))
        return result

    def of(self, image: int | Int[np.ndarray, " b"], columns: Int[np.ndarray, " k"] | slice) -> Suspects:
        """Return some columns of one image of a batch, or of some images with all columns."""
        return Suspects(
            self.indices[columns],
            self.values[image, columns],
            self.smoothed[image, columns],
            {reason: holds[image, columns] for reason, holds in self.reasons.items()},
        )


def suspects(look: Look, smoothed: Look | None, statistics: FeatureStatistics) -> Suspects:
    """Return what speaks against each feature of images; `smoothed` is the look at the smoothed pictures."""
    other = look if smoothed is None else smoothed
    indices = np.union1d(look.indices, other.indices).astype(np.int64)
    values, again = _spread(look, indices), _spread(other, indices)
    fires = values > 0
    return Suspects(
        indices,
        values,
        again,
        {
            Reason.UNSEEN: fires & (statistics.firing_rate[indices] < RARE),
            Reason.EXCESS: values > np.maximum(statistics.upper[indices], 0),
            Reason.MOVED: fires & statistics.moved[indices],
            Reason.TEXT: fires & statistics.text[indices],
            Reason.UNSTABLE: np.abs(values - again) > statistics.tolerance,
        },
    )


def _spread(look: Look, indices: Int[np.ndarray, " m"]) -> Float[np.ndarray, "*batch m"]:
    values = np.zeros((*look.values.shape[:-1], len(indices)), np.float32)
    values[..., np.searchsorted(indices, look.indices)] = look.values
    return values
