"""From attacked and clean drawings to the bundle's calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from services.defense import DefenseCalibration, FilterChoice, FilterMode, screen
from services.defense.detector import Detector
from services.defense.features import FeatureStatistics
from services.defense.scores import ONE_LOOK, TWO_LOOKS
from services.dictionaries import Dictionary, Modality
from training.defense.data import StudyData
from training.defense.fit import fit_detector
from training.defense.measure import correct
from training.defense.observe import Decoder, Observed, join, scores

# (attack, epsilon in pixel levels)
Setting = tuple[str, int]


@dataclass(frozen=True)
class Seen:
    """What the detector is made from.

    Attributes
    ----------
    clean : Observed
        Clean calibration drawings, the harmless changes included.
    base : Observed
        The drawings that were attacked, before.
    attacked : mapping of (attack, epsilon) to Observed
        The same after.
    """

    clean: Observed
    base: Observed
    attacked: Mapping[Setting, Observed]


def clean_activations(dictionary: Dictionary, units: np.ndarray, limit: int = 6_000) -> np.ndarray:
    """Return the activations of clean embeddings, float32 (N, n), of a random `limit` of them where there are more."""
    chosen = np.random.default_rng(0).permutation(len(units))[:limit]
    with torch.no_grad():
        return dictionary.encode(torch.from_numpy(units[chosen]), Modality.IMAGE).numpy()


def attack_pairs(seen: Seen, settings: Sequence[Setting]) -> tuple[np.ndarray, np.ndarray]:
    """Return activations before and after the attacks of `settings`, one after another."""
    after = np.concatenate([seen.attacked[setting].z for setting in settings])
    return np.concatenate([seen.base.z] * len(settings)), after


def statistics_from(
    seen: Seen, learnt_on: Sequence[Setting], clean_z: np.ndarray, text: np.ndarray
) -> FeatureStatistics:
    """Measure the features; which of them an attack moves is learnt on `learnt_on`: one attack."""
    return FeatureStatistics.measure(
        clean=clean_z,
        attacked=attack_pairs(seen, learnt_on),
        smoothed=(seen.clean.z, seen.clean.smoothed_z),
        text=text,
    )


def detectors_from(
    seen: Seen, settings: list[Setting], statistics: FeatureStatistics, decoder: Decoder
) -> dict[bool, Detector]:
    """Fit both detectors on the attacks of `settings`."""
    attacked = join([seen.attacked[setting] for setting in settings])
    fitted = {}
    for second_look, names in ((False, ONE_LOOK), (True, TWO_LOOKS)):
        clean = scores(seen.clean, statistics, decoder, second_look)
        fitted[second_look] = fit_detector(
            names, clean, scores(attacked, statistics, decoder, second_look), clean
        )
    return fitted


def answered(
    observed: Observed,
    calibration: DefenseCalibration,
    decoder: Decoder,
    *,
    second_look: bool,
    false_positive_rate: float,
    choice: FilterChoice | None = None,
    filter_all: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return verdicts (B,), embeddings as the service answers them (B, d), and features changed (B,)."""
    found = screen(
        [observed.look(i) for i in range(len(observed))],
        observed.noise.tolist(),
        [observed.smoothed_look(i) for i in range(len(observed))] if second_look else None,
        calibration,
        decoder.rows,
        decoder.origin,
        choice=choice or calibration.choices[second_look],
        false_positive_rate=false_positive_rate,
        filter_all=filter_all,
    )
    return (
        np.array([item.adversarial for item in found]),
        np.stack([item.unit for item in found]),
        np.array([int((item.filtered != item.found.values).sum()) for item in found]),
    )


def choose_filters(
    seen: Seen,
    calibration: DefenseCalibration,
    decoder: Decoder,
    data: StudyData,
    chosen_on: list[Setting],
    false_positive_rate: float,
) -> dict[bool, FilterChoice]:
    """Return the filters with the highest accuracy on attacked calibration drawings, by whether there is a second look.

    Only drawings that are called adversarial are filtered, as in the service; so clean accuracy is bounded by the
    operating point, and what is left to choose is how much of the attacked ones comes back.
    """
    truth, texts = data.calibration.truth[: len(seen.base)], data.texts.numpy()
    best: dict[bool, FilterChoice] = {}
    for second_look in (False, True):
        values = {}
        for mode, keep in product(FilterMode, (True, False)):
            if mode is FilterMode.RESTORE and not second_look:
                continue
            units = [
                answered(
                    seen.attacked[setting],
                    calibration,
                    decoder,
                    second_look=second_look,
                    false_positive_rate=false_positive_rate,
                    choice=FilterChoice(mode, keep),
                )[1]
                for setting in chosen_on
            ]
            values[FilterChoice(mode, keep)] = float(
                np.mean([correct(u, texts, truth).mean() for u in units])
            )
        best[second_look] = max(values, key=lambda choice: values[choice])
    return best


def calibrate(
    seen: Seen,
    data: StudyData,
    dictionary: Dictionary,
    text: np.ndarray,
    fingerprint: str,
    *,
    learnt_on: Sequence[Setting],
    chosen_on: list[Setting],
    false_positive_rate: float,
) -> DefenseCalibration:
    """Make the calibration that ships: on every attack and epsilon of the calibration half."""
    decoder = Decoder.of(dictionary)
    statistics = statistics_from(seen, learnt_on, clean_activations(dictionary, data.clean_units), text)
    start = DefenseCalibration(
        tower_fingerprint=fingerprint,
        dictionary=dictionary.name,
        statistics=statistics,
        detectors=detectors_from(seen, sorted(seen.attacked), statistics, decoder),
        choices=dict.fromkeys((False, True), FilterChoice(FilterMode.KEEP_NORMAL, True)),
        labels=data.bundled,
        label_units=data.bundled_units,
    )
    choices = choose_filters(seen, start, decoder, data, chosen_on, false_positive_rate)
    return replace(start, choices=choices)
