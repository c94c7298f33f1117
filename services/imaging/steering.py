"""Steering in feature space: from an embedding and edits to the steered embedding.

With e of norm rho, unit e^ = e / rho, activations z = encode(e^) and decoder rows d_j, edits give z' and

    e' = rho * norm(e^ + sum_j (z'_j - z_j) d_j)

so what the dictionary does not explain, the residual, is kept. The size of the change, ||e' - e|| / rho, is
what makes edits of different features comparable: a chord of the unit sphere, from 0 to 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from services.dictionaries.base import Dictionary, Modality
from services.errors import InvalidInput, SteeringUnsupported, UnknownFeature
from services.imaging.edits import MAX_STRENGTH, Edit, FromReference, Scale, SetQuantile, Steering
from services.imaging.statistics import ActivationStatistics
from services.tables import ModalityTable


@dataclass(frozen=True)
class Embedding:
    """An embedding, split into direction and length.

    Attributes
    ----------
    unit : float32 array, shape (d,)
        e^.
    norm : float
        rho.
    modality : Modality
        Of the tower that it comes from.
    """

    unit: Float[NDArray[np.float32], " d"]
    norm: float
    modality: Modality


@dataclass(frozen=True)
class Steered:
    """What edits did.

    Attributes
    ----------
    unit : float32 array, shape (d,)
        Direction of e'.
    norm : float
        rho, as before.
    z, z_steered : float32 array, shape (n,)
        Activations before, and as the edits ask for them. With `Steering.delta` the applied change is a
        multiple of theirs.
    delta : float
        ||e' - e|| / rho, in [0, 2]; exactly 0 where nothing changed.
    """

    unit: Float[NDArray[np.float32], " d"]
    norm: float
    z: Float[NDArray[np.float32], " n"]
    z_steered: Float[NDArray[np.float32], " n"]
    delta: float


@dataclass(frozen=True)
class FeatureSpace:
    """A dictionary with what edits need to know about its features.

    Attributes
    ----------
    dictionary : Dictionary
        Of the tower whose embeddings are steered.
    table : ModalityTable or None
        Labels, for edits by label.
    statistics : ActivationStatistics or None
        Quantiles, for `SetQuantile`.
    """

    dictionary: Dictionary
    table: ModalityTable | None = None
    statistics: ActivationStatistics | None = None

    def features(self, edit: Edit) -> NDArray[np.int64]:
        """Return the ids that `edit` names.

        Raises
        ------
        UnknownFeature
            For an id past the last one.
        SteeringUnsupported
            For a label where there is no modality table.
        InvalidInput
            Where the label has no feature.
        """
        if isinstance(edit.features, tuple):
            ids = np.array(edit.features, np.int64)
            outside = ids[(ids < 0) | (ids >= self.dictionary.n_features)]
            if len(outside):
                raise UnknownFeature.numbered(int(outside[0]), self.dictionary.n_features, "ids")
            return ids
        if self.table is None:
            raise SteeringUnsupported(
                f"dictionary {self.dictionary.name!r} has no modality table, so no labels"
            )
        ids = np.flatnonzero(self.table.label == edit.features.value)
        if not len(ids):
            message = f"no feature of {self.dictionary.name!r} is labelled {edit.features.value}"
            raise InvalidInput(message, [("label", message)])
        return ids


Embed = Callable[[FromReference], Embedding]


def edited(
    z: NDArray[np.float32],
    edits: Sequence[Edit],
    space: FeatureSpace,
    modality: Modality,
    embed: Embed,
) -> NDArray[np.float32]:
    """Return z' for activations `z`, shape (n,), of an embedding of `modality`.

    `embed` turns a reference into its embedding. Activations stay at or above 0 except for `neurons`, whose
    features are signed.

    Raises
    ------
    InvalidInput
        With a path such as ``edits[2].strength``.
    """
    steered = z.copy()
    for i, edit in enumerate(edits):
        try:
            if not 0 <= edit.strength <= MAX_STRENGTH:
                message = f"strength {edit.strength:g} is not in [0, {MAX_STRENGTH:g}]"
                raise InvalidInput(message, [("strength", message)])
            ids = space.features(edit)
            target = _target(edit, steered, ids, space, modality, embed)
        except InvalidInput as error:
            violations = [(f"edits[{i}].{path}", what) for path, what in error.violations]
            raise type(error)(error.message, violations, reason=error.reason) from error
        moved = (1 - edit.strength) * steered[ids] + edit.strength * target
        steered[ids] = moved if space.dictionary.kind == "neurons" else np.maximum(moved, 0)
    return steered


def _target(
    edit: Edit,
    z: NDArray[np.float32],
    ids: NDArray[np.int64],
    space: FeatureSpace,
    modality: Modality,
    embed: Embed,
) -> NDArray[np.float32]:
    operation = edit.operation
    if isinstance(operation, Scale):
        return np.float32(operation.factor) * z[ids]
    if isinstance(operation, SetQuantile):
        if space.statistics is None:
            raise SteeringUnsupported(
                f"the bundle has no activation quantiles for dictionary {space.dictionary.name!r}"
            )
        return space.statistics.quantile(ids, operation.q, modality)
    reference = embed(operation)
    return activations(space.dictionary, reference)[ids]


@torch.inference_mode()
def activations(dictionary: Dictionary, embedding: Embedding) -> NDArray[np.float32]:
    """Return z, shape (n,), of one embedding."""
    z = dictionary.encode(torch.from_numpy(embedding.unit)[None], embedding.modality)[0]
    return z.float().numpy()


@torch.inference_mode()
def steer(embedding: Embedding, steering: Steering, space: FeatureSpace, embed: Embed) -> Steered:
    """Apply the edits of `steering` to an embedding.

    Parameters
    ----------
    embedding : Embedding
        e.
    steering : Steering
        Edits, and the size that the change is rescaled to, if any.
    space : FeatureSpace
        The dictionary that the edits are about.
    embed : callable
        From a reference to its embedding.

    Raises
    ------
    InvalidInput
        Where an edit cannot be applied, or the wanted size cannot be reached.
    """
    z = activations(space.dictionary, embedding)
    z_steered = edited(z, steering.edits, space, embedding.modality, embed)
    change = torch.from_numpy(z_steered - z)
    moved = torch.nonzero(change)[:, 0]
    if not len(moved):
        return Steered(embedding.unit, embedding.norm, z, z_steered, 0.0)
    rows = space.dictionary.decoder_rows(embedding.modality)
    # float64: the chord of a small change is a difference of nearly equal vectors.
    direction = (change[moved].double() @ rows[moved].double()).numpy()
    unit = embedding.unit.astype(np.float64)
    if steering.delta is not None:
        direction = rescaled(unit, direction, steering.delta)
    steered = unit + direction
    steered /= np.linalg.norm(steered)
    delta = float(np.linalg.norm(steered - unit))
    if delta == 0.0:
        return Steered(embedding.unit, embedding.norm, z, z_steered, 0.0)
    return Steered(steered.astype(np.float32), embedding.norm, z, z_steered, delta)


def rescaled(
    unit: Float[NDArray[np.float64], " d"], direction: Float[NDArray[np.float64], " d"], delta: float
) -> Float[NDArray[np.float64], " d"]:
    """Return the multiple c of `direction` for which ||norm(unit + c direction) - unit|| is `delta`.

    With direction = a unit + b u, u a unit vector at right angles to `unit`, the turn has angle theta where
    tan(theta) = c b / (1 + c a), and a chord of length delta spans theta = 2 arcsin(delta / 2).

    Raises
    ------
    InvalidInput
        Where no positive multiple turns so far.
    """
    if delta == 0.0:
        return np.zeros_like(direction)
    theta = 2 * math.asin(min(delta, 2.0) / 2)
    along = float(unit @ direction)
    across = float(np.linalg.norm(direction - along * unit))
    # c (b cos(theta) - a sin(theta)) = sin(theta)
    rate = across * math.cos(theta) - along * math.sin(theta)
    if rate <= 1e-9 * math.hypot(along, across):
        message = f"these edits cannot move the embedding by {delta:g} times its norm"
        raise InvalidInput(message, [("delta", message)], reason="DELTA_OUT_OF_REACH")
    return direction * (math.sin(theta) / rate)
