"""Everything about one image: scores, verdict, suspicious features, and the filtered embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from services.defense.calibration import DefenseCalibration
from services.defense.detector import Detector, probability
from services.defense.features import Look, Suspects, suspects
from services.defense.filtering import MODES, FilterChoice, FilterMode, rebuild
from services.defense.scores import detection_scores
from services.errors import InvalidInput

# Images that are screened at once: their features together are columns of every array.
_TOGETHER = 32


@dataclass(frozen=True)
class Screened:
    """What was found of one image.

    Attributes
    ----------
    adversarial : bool
        The verdict.
    score, threshold : float
        Calibrated score and where the verdict turns, both in [0, 1].
    p_value : float
        Share of clean calibration images that score at least this high, in (0, 1].
    scores : mapping of str to float
        What the score is made of; see `services.defense.scores`.
    found : Suspects
        Features and reasons.
    filtered : float32 array, shape (m,)
        The activations that the filtered embedding is made of.
    unit : float32 array, shape (d,)
        The filtered embedding.
    was_filtered : bool
        If not, `unit` and `filtered` are as encoded.
    """

    adversarial: bool
    score: float
    threshold: float
    p_value: float
    scores: dict[str, float]
    found: Suspects
    filtered: Float[np.ndarray, " m"]
    unit: Float[np.ndarray, " d"]
    was_filtered: bool


def choose(
    calibration: DefenseCalibration, mode: FilterMode | None, keep_residual: bool | None, second_look: bool
) -> FilterChoice:
    """Return how to filter: what is asked for, and the calibration's choice where nothing is.

    Raises
    ------
    InvalidInput
        For RESTORE without a second look.
    """
    best = calibration.choices[second_look]
    chosen = FilterChoice(
        best.mode if mode is None else mode, best.keep_residual if keep_residual is None else keep_residual
    )
    if chosen.mode is FilterMode.RESTORE and not second_look:
        message = "RESTORE needs second_look"
        raise InvalidInput(message, [("options.mode", message)])
    return chosen


def screen(
    looks: Sequence[Look],
    noise: Sequence[float] | Float[np.ndarray, " B"],
    smoothed: Sequence[Look] | None,
    calibration: DefenseCalibration,
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
    *,
    choice: FilterChoice,
    false_positive_rate: float,
    filter_all: bool = False,
) -> list[Screened]:
    """Judge and filter images.

    Parameters
    ----------
    looks : sequence of Look
        One an image.
    noise : float array, or sequence, of length B
        r4 of each.
    smoothed : sequence of Look or None
        Looks at the smoothed pictures, for the second look.
    calibration : DefenseCalibration
        Of the dictionary that the looks are in.
    rows, origin : float32 arrays, shapes (n, d) and (d,)
        D and b of that dictionary for images.
    choice : FilterChoice
        How to filter; see `choose`.
    false_positive_rate : float
        The operating point, in (0, 1).
    filter_all : bool
        Filter images whose verdict is clean, too.
    """
    detector = calibration.detectors[smoothed is not None]
    threshold = detector.threshold(false_positive_rate)
    found: list[Screened] = []
    for start in range(0, len(looks), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        others = None if smoothed is None else smoothed[part]
        judged = _judge(looks[part], np.asarray(noise[part]), others, calibration, detector, rows, origin)
        changed = np.full(len(looks[part]), True) if filter_all else judged.logits >= threshold
        found += _screened(looks[part], judged, detector, threshold, changed, rows, origin, choice)
    return found


@dataclass(frozen=True)
class _Judged:
    """A batch with its scores, before anything is filtered."""

    look: Look
    smoothed: Look | None
    scores: Float[np.ndarray, "B k"]
    logits: Float[np.ndarray, " B"]
    found: Suspects


def _judge(
    looks: Sequence[Look],
    noise: Float[np.ndarray, " B"],
    smoothed: Sequence[Look] | None,
    calibration: DefenseCalibration,
    detector: Detector,
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
) -> _Judged:
    look, again = Look.stack(looks), None if smoothed is None else Look.stack(smoothed)
    scores = detection_scores(look, noise, again, calibration.statistics, rows, origin)
    return _Judged(look, again, scores, detector.logit(scores), suspects(look, again, calibration.statistics))


def _screened(
    looks: Sequence[Look],
    judged: _Judged,
    detector: Detector,
    threshold: float,
    changed: Bool[np.ndarray, " B"],
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
    choice: FilterChoice,
) -> list[Screened]:
    """Filter the images that are to be changed, and part the batch."""
    found = judged.found
    filtered, units = found.values, [look.unit for look in looks]
    (places,) = np.nonzero(changed)
    if len(places):
        some = found.of(places, slice(None))
        activations = MODES[choice.mode](some)
        filtered = found.values.copy()
        filtered[places] = activations
        look = Look(judged.look.unit[places], judged.look.indices, judged.look.values[places])
        smoothed = judged.smoothed
        other = (
            None
            if smoothed is None
            else Look(smoothed.unit[places], smoothed.indices, smoothed.values[places])
        )
        rebuilt = rebuild(look, other, some, activations, rows, origin, choice)
        for place, unit in zip(places, rebuilt, strict=True):
            units[place] = unit
    active = (found.values != 0) | (found.smoothed != 0)
    screened = []
    for i, logit in enumerate(judged.logits.tolist()):
        columns = np.flatnonzero(active[i])
        screened.append(
            Screened(
                adversarial=logit >= threshold,
                score=probability(logit),
                threshold=probability(threshold),
                p_value=detector.p_value(logit),
                scores=dict(zip(detector.names, judged.scores[i].tolist(), strict=True)),
                found=found.of(i, columns),
                filtered=filtered[i, columns],
                unit=units[i],
                was_filtered=bool(changed[i]),
            )
        )
    return screened
