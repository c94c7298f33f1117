"""A world whose truth is known: orthonormal features, clean images, and an attack that raises four of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.defense import DefenseCalibration, FeatureStatistics, FilterChoice, FilterMode, Look
from services.defense.detector import Detector
from services.defense.scores import ONE_LOOK, TWO_LOOKS, detection_scores
from training.defense.fit import fit_detector

N, D = 32, 64
ATTACKED = np.array([20, 21, 22, 23])
TEXT = np.arange(N) >= 28


@dataclass(frozen=True)
class World:
    """Decoder rows, clean and attacked activations, and embeddings of both."""

    rows: np.ndarray
    origin: np.ndarray
    clean: np.ndarray
    attacked: np.ndarray

    def look(self, z: np.ndarray, off: float = 0.0) -> Look:
        """Return the look at activations, with `off` in a direction that no feature explains."""
        e = z @ self.rows + self.origin
        e = e + off * np.linalg.svd(self.rows)[2][-1]
        active = np.flatnonzero(z)
        return Look(
            (e / np.linalg.norm(e)).astype(np.float32),
            active,
            (z[active] / np.linalg.norm(e)).astype(np.float32),
        )


def make_world(seed: int = 0, images: int = 400, strength: float = 1.0) -> World:
    """Clean images have 4 of the first 20 features; the attack adds the planted four to each."""
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.standard_normal((D, N)))[0].T.astype(np.float32)
    clean = np.zeros((images, N), np.float32)
    for row in clean:
        row[rng.choice(20, 4, replace=False)] = rng.uniform(0.5, 1.0, 4)
    attacked = clean.copy()
    attacked[:, ATTACKED] += strength * rng.uniform(0.3, 0.6, (images, len(ATTACKED))).astype(np.float32)
    return World(rows, np.zeros(D, np.float32), clean, attacked)


def statistics(world: World, attacked: np.ndarray | None = None) -> FeatureStatistics:
    """Measure the world on its first half; smoothing changes clean activations by little."""
    half = len(world.clean) // 2
    rng = np.random.default_rng(1)
    smoothed = world.clean[:half] * rng.uniform(0.98, 1.02, (half, N)).astype(np.float32)
    return FeatureStatistics.measure(
        world.clean[:half],
        (world.clean[:half], (world.attacked if attacked is None else attacked)[:half]),
        (world.clean[:half], smoothed),
        TEXT,
    )


def all_scores(world: World, z: np.ndarray, known: FeatureStatistics, off: float = 0.0) -> np.ndarray:
    """Return the scores of many images, one look each, with `off` out of reach of the features."""
    return np.stack(
        [detection_scores(world.look(row, off), 0.0, None, known, world.rows, world.origin) for row in z]
    )


def calibration(world: World, known: FeatureStatistics) -> DefenseCalibration:
    """Calibrate on the first half of the world; the second look repeats the first four weights."""
    half = len(world.clean) // 2
    clean = all_scores(world, world.clean[:half], known)
    one = fit_detector(ONE_LOOK, clean, all_scores(world, world.attacked[:half], known), clean)
    two = Detector(
        TWO_LOOKS,
        *(np.append(getattr(one, part), 1.0) for part in ("floor", "mean", "scale")),
        np.append(one.weight, 0.0),
        one.bias,
        one.clean,
    )
    rng = np.random.default_rng(2)
    units = rng.standard_normal((5, D)).astype(np.float32)
    return DefenseCalibration(
        tower_fingerprint="f",
        dictionary="sae",
        statistics=known,
        detectors={False: one, True: two},
        choices={False: FilterChoice(FilterMode.DROP, True), True: FilterChoice(FilterMode.RESTORE, True)},
        labels=("a", "b", "c", "d", "e"),
        label_units=units / np.linalg.norm(units, axis=1, keepdims=True),
        metrics={"auroc": 1.0},
    )
