"""Steering in feature space: from an embedding and edits to the steered embedding.

With e of norm rho, unit e^ = e / rho, activations z = encode(e^) and decoder rows d_j, edits give z' and

    e' = rho * norm(e^ + sum_j (z'_j - z_j) d_j)

so what the dictionary does not explain, the residual, is kept. The size of the change, ||e' - e|| / rho, is
a chord of the unit sphere, from 0 to 2; its dose, in a bundle that knows doses, is its length as the generator sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from services.errors import InvalidInput, SteeringUnsupported, UnknownFeature
from services.imaging.dose import MAX_GAIN, MAX_OVERSHOOT, Attributes
from services.imaging.edits import (
    MAX_STRENGTH,
    AttributeEdit,
    Edit,
    FromReference,
    Scale,
    SetQuantile,
    Steering,
)
from services.imaging.statistics import ActivationStatistics
from services.modality.modalities import Modality
from services.modality.tables import Label, ModalityTable

# Under this share of what went in, only the rounding of float32 embeddings and rows is left.
ROUNDING = 1e-6


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
        ||e' - e|| / rho, in [0, 2]; exactly 0, and `unit` the very array that came in, where nothing changed.
    dose : float or None
        Of the change; None where the bundle knows no doses.
    """

    unit: Float[NDArray[np.float32], " d"]
    norm: float
    z: Float[NDArray[np.float32], " n"]
    z_steered: Float[NDArray[np.float32], " n"]
    delta: float
    dose: float | None = None


@dataclass(frozen=True)
class FeatureSpace:
    """What edits need to know of a dictionary; numpy alone, so that a process without torch can steer too.

    Attributes
    ----------
    name : str
        Of the dictionary.
    n_features : int
        n.
    signed : bool
        Whether activations may be negative, as those of `neurons` are.
    rows : callable
        From a modality to D, float32, shape (n, d).
    table : ModalityTable or None
        Labels, for edits by label.
    statistics : ActivationStatistics or None
        Quantiles, for `SetQuantile`.
    attributes : Attributes or None
        Doses, and attributes to turn.
    """

    name: str
    n_features: int
    signed: bool
    rows: Callable[[Modality], Float[NDArray[np.float32], "n d"]]
    table: ModalityTable | None = None
    statistics: ActivationStatistics | None = None
    attributes: Attributes | None = None

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
            outside = ids[(ids < 0) | (ids >= self.n_features)]
            if len(outside):
                raise UnknownFeature.numbered(int(outside[0]), self.n_features, "ids")
            return ids
        if self.table is None:
            raise SteeringUnsupported(f"dictionary {self.name!r} has no modality table, so no labels")
        ids = np.flatnonzero(self.table.label == edit.features.value)
        if not len(ids):
            message = f"no feature of {self.name!r} is labelled {edit.features.value}"
            raise InvalidInput(message, [("label", message)])
        return ids


# From a reference to its activations, float32, shape (n,).
EncodeReference = Callable[[FromReference], NDArray[np.float32]]


def edited(
    z: NDArray[np.float32],
    edits: Sequence[Edit],
    space: FeatureSpace,
    modality: Modality,
    encode_reference: EncodeReference,
    norm: float = 1.0,
) -> NDArray[np.float32]:
    """Return z' for activations `z`, shape (n,), of an embedding of `modality` and length `norm`.

    Activations stay at or above 0 unless the dictionary's are signed.

    Raises
    ------
    InvalidInput
        With a path such as ``edits[2].strength``.
    """
    steered = z.copy()
    for i, edit in enumerate(edits):
        try:
            _check_strength(edit.strength)
            ids = space.features(edit)
            target = _target(edit, steered, ids, space, modality, encode_reference)
        except InvalidInput as error:
            raise error.moved(lambda path: f"edits[{i}].{path}") from error  # noqa: B023  (called at once)
        reach = edit.strength
        if isinstance(edit.operation, SetQuantile) and space.attributes is not None:
            rise = norm * (target - steered[ids]).astype(np.float64) @ space.rows(modality)[ids]
            dose = space.attributes.dose(rise)
            reach *= min(MAX_GAIN, max(1.0, space.attributes.config.unit / dose)) if dose else 1.0
        moved = (1 - reach) * steered[ids] + reach * target
        steered[ids] = moved if space.signed else np.maximum(moved, 0)
    return steered


def turned(
    z: NDArray[np.float32],
    edits: Sequence[AttributeEdit],
    space: FeatureSpace,
    modality: Modality,
    norm: float = 1.0,
) -> NDArray[np.float32]:
    """Return activations `z`, shape (n,), with attributes turned, of an embedding of `modality` and length `norm`.

    Raises
    ------
    InvalidInput
        With a path such as ``attributes[0].name``.
    SteeringUnsupported
        Where the bundle has no attributes.
    """
    steered = z.copy()
    for i, edit in enumerate(edits):
        if space.attributes is None:
            raise SteeringUnsupported("the bundle has no attributes to turn")
        try:
            _check_strength(edit.strength)
            attribute = space.attributes.attribute(edit.name, space.name)
        except InvalidInput as error:
            raise error.moved(lambda path: f"attributes[{i}].{path}") from error  # noqa: B023  (called at once)
        direction = norm * attribute.values.astype(np.float64) @ space.rows(modality)[attribute.ids]
        size = edit.strength * attribute.entry.dose / space.attributes.dose(direction)
        moved = steered[attribute.ids] + np.float32(size) * attribute.values
        steered[attribute.ids] = moved if space.signed else np.maximum(moved, 0)
    return steered


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= MAX_STRENGTH:
        message = f"strength {strength:g} is not in [0, {MAX_STRENGTH:g}]"
        raise InvalidInput(message, [("strength", message)])


def _target(
    edit: Edit,
    z: NDArray[np.float32],
    ids: NDArray[np.int64],
    space: FeatureSpace,
    modality: Modality,
    encode_reference: EncodeReference,
) -> NDArray[np.float32]:
    operation = edit.operation
    if isinstance(operation, Scale):
        return np.float32(operation.factor) * z[ids]
    if isinstance(operation, SetQuantile):
        statistics = space.statistics
        if statistics is None:
            raise SteeringUnsupported(f"the bundle has no activation quantiles for dictionary {space.name!r}")
        target = z[ids]
        # A label sweeps in features that no input ever activated; they have no quantile and stay as they are.
        known = statistics.active[ids] if isinstance(edit.features, Label) else np.ones(len(ids), bool)
        target[known] = statistics.quantile(ids[known], operation.q, modality)
        return target
    try:
        return encode_reference(operation)[ids]
    except InvalidInput as error:
        raise error.at("reference.text" if operation.image is None else "reference.image.data") from error


def steer(
    embedding: Embedding,
    z: NDArray[np.float32],
    steering: Steering,
    space: FeatureSpace,
    encode_reference: EncodeReference,
) -> Steered:
    """Apply the edits of `steering` to an embedding.

    Parameters
    ----------
    embedding : Embedding
        e.
    z : float32 array, shape (n,)
        Its activations.
    steering : Steering
        Edits, and the size that the change is rescaled to, if any.
    space : FeatureSpace
        The dictionary that the edits are about.
    encode_reference : callable
        From a reference to its activations.

    Raises
    ------
    InvalidInput
        Where an edit cannot be applied, the edits leave nothing of the embedding, or the wanted size cannot be
        reached.
    """
    modality, norm, known = embedding.modality, embedding.norm, space.attributes
    z_steered = edited(z, steering.edits, space, modality, encode_reference, norm)
    z_steered = turned(z_steered, steering.attributes, space, modality, norm)
    if steering.dose is not None:
        _check_dose(steering, known)
    # float64: the chord of a small change is a difference of nearly equal vectors.
    change = z_steered.astype(np.float64) - z
    (moved,) = np.nonzero(change)
    unchanged = Steered(embedding.unit, norm, z, z_steered, 0.0, None if known is None else 0.0)
    if not len(moved) or steering.delta == 0 or steering.dose == 0:
        return unchanged
    direction = change[moved] @ space.rows(modality)[moved].astype(np.float64)
    unit = embedding.unit.astype(np.float64)
    if steering.delta is not None:
        direction = rescaled(unit, direction, steering.delta)
    elif steering.dose is not None and known is not None:
        towards = any(isinstance(edit.operation, FromReference) for edit in steering.edits)
        largest = MAX_OVERSHOOT if towards else math.inf
        direction = dosed(unit, direction, steering.dose / norm, known.dose, largest)
    steered = unit + direction
    length = np.linalg.norm(steered)
    if length < ROUNDING:
        message = "these edits leave nothing of the embedding"
        raise InvalidInput(message, [("edits", message)])
    steered /= length
    delta = float(np.linalg.norm(steered - unit))
    if delta == 0.0:
        return unchanged
    dose = None if known is None else known.dose(norm * (steered - unit))
    return Steered(steered.astype(np.float32), norm, z, z_steered, delta, dose)


def _check_dose(steering: Steering, known: Attributes | None) -> None:
    if known is None:
        raise SteeringUnsupported("the bundle knows no doses: use `delta`")
    if steering.delta is not None:
        message = "a change has one size: give `dose` or `delta`"
        raise InvalidInput(message, [("dose", message)])


def dosed(
    unit: Float[NDArray[np.float64], " d"],
    direction: Float[NDArray[np.float64], " d"],
    dose: float,
    measure: Callable[[Float[NDArray[np.float64], " d"]], float],
    largest: float,
) -> Float[NDArray[np.float64], " d"]:
    """Return the smallest multiple c of `direction` for which norm(unit + c direction) - unit measures `dose`.

    Parameters
    ----------
    unit, direction : float64 array, shape (d,)
        Of the embedding, and of its change.
    dose : float
        For a unit embedding.
    measure : callable
        Length of a change.
    largest : float
        c ends here, short of the dose if need be.

    Raises
    ------
    InvalidInput
        Where no multiple up to a hundred measures so much: the change ends at the direction's own end.
    """

    def measured(c: float) -> float:
        moved = unit + c * direction
        return measure(moved / np.linalg.norm(moved) - unit)

    # Geometric steps, so that the first crossing is found however long the direction is.
    end = min(largest, 100.0)
    steps = end * np.geomspace(1e-4, 1, 60)
    over = next((i for i, c in enumerate(steps) if measured(c) >= dose), None)
    if over is None:
        if end == largest:
            return direction * largest
        message = f"these edits cannot move the embedding by a dose of {dose:g}"
        raise InvalidInput(message, [("dose", message)], reason="DOSE_OUT_OF_REACH")
    low, high = (steps[over - 1] if over else 0.0), steps[over]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if measured(middle) < dose else (low, middle)
    return direction * float(high)


def rescaled(
    unit: Float[NDArray[np.float64], " d"], direction: Float[NDArray[np.float64], " d"], delta: float
) -> Float[NDArray[np.float64], " d"]:
    """Return the multiple c of `direction` for which ||norm(unit + c direction) - unit|| is `delta`.

    With direction = a unit + b u, u a unit vector at right angles to `unit`, the turn has angle theta where
    tan(theta) = c b / (1 + c a), and a chord of length delta spans theta = 2 arcsin(delta / 2).

    Raises
    ------
    InvalidInput
        Where no positive multiple turns so far, as none does along `unit`.
    """
    theta = 2 * math.asin(min(delta, 2.0) / 2)
    along = float(unit @ direction)
    across = float(np.linalg.norm(direction - along * unit))
    # c (b cos(theta) - a sin(theta)) = sin(theta)
    rate = across * math.cos(theta) - along * math.sin(theta)
    size = math.hypot(along, across)
    if across <= ROUNDING * size or rate <= 1e-9 * size:
        message = f"these edits cannot move the embedding by {delta:g} times its norm"
        raise InvalidInput(message, [("delta", message)], reason="DELTA_OUT_OF_REACH")
    return direction * (math.sin(theta) / rate)
