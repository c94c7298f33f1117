"""Everything about one image: scores, verdict, suspicious features, and the filtered embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from services.defense.calibration import DefenseCalibration
from services.defense.detector import Detector, probability
from services.defense.features import Look, Suspects, suspects
from services.defense.filtering import MODES, FilterChoice, FilterMode, rebuild
from services.defense.scores import detection_scores
from services.errors import InvalidInput


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
    noise: Sequence[float],
    twins: Sequence[Look] | None,
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
    noise : sequence of float
        r4 of each.
    twins : sequence of Look or None
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
    detector = calibration.detectors[twins is not None]
    threshold = detector.threshold(false_positive_rate)
    pairs = [(look, None) for look in looks] if twins is None else list(zip(looks, twins, strict=True))
    return [
        _screen(look, float(level), twin, calibration, detector, rows, origin, choice, threshold, filter_all)
        for (look, twin), level in zip(pairs, noise, strict=True)
    ]


def _screen(
    look: Look,
    noise: float,
    twin: Look | None,
    calibration: DefenseCalibration,
    detector: Detector,
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
    choice: FilterChoice,
    threshold: float,
    filter_all: bool,
) -> Screened:
    scores = detection_scores(look, noise, twin, calibration.statistics, rows, origin)
    logit = float(detector.logit(scores))
    adversarial = logit >= threshold
    found = suspects(look, twin, calibration.statistics)
    was_filtered = adversarial or filter_all
    filtered = MODES[choice.mode](found) if was_filtered else found.values
    return Screened(
        adversarial=adversarial,
        score=probability(logit),
        threshold=probability(threshold),
        p_value=detector.p_value(logit),
        scores=dict(zip(detector.names, scores.tolist(), strict=True)),
        found=found,
        filtered=filtered,
        unit=rebuild(look, twin, found, filtered, rows, origin, choice) if was_filtered else look.unit,
        was_filtered=was_filtered,
    )
