"""Embeddings whose gender and stereotype directions are known, because they were put there.

e = norm(sum_j z_j d_j + noise) with rows d_j, orthonormal but for those that lean on the gender axis. Rows 0 and 1
carry gender (one a gender). Rows 2 and 6 carry a stereotype: they fire with the professions that are drawn as men,
whoever is in the picture. Rows 3 to 5 fire on everybody alike: a constant shift of the score when they are removed.
The others say what the picture shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from services.bias.ablation import Side
from services.bias.audit import AuditSettings
from services.bias.cases import MAN, UNGENDERED, WOMAN, Cases
from services.modality.modalities import Modality

D, N_FEATURES = 128, 120
WOMAN_FEATURE, MAN_FEATURE, STEREOTYPE, CONSTANT = 0, 1, (2, 6), (3, 4, 5)
PROFESSIONS = ("artist", "guard", "judge", "pilot", "singer", "teacher")
STEREOTYPED = ("guard", "pilot")
SETTINGS = AuditSettings(logit_scale=8.0, resamples=300, null_sets=300)


@dataclass(frozen=True)
class World:
    cases: Cases
    direction: np.ndarray
    sides: dict[Modality, Side]


def make_world(seed: int = 0, items: int = 600) -> World:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0].T.astype(np.float32)
    rows, gender_axis = basis[:N_FEATURES].copy(), basis[0] - basis[1]
    # The stereotype and the constants lean on the gender axis, so that the score sees them.
    for feature, lean in (*((j, -0.7) for j in STEREOTYPE), *((j, 0.3) for j in CONSTANT)):
        leaning = np.sqrt(1 - lean**2) * basis[feature] + lean * gender_axis / np.sqrt(2)
        rows[feature] = leaning
    profession = np.array(PROFESSIONS)[rng.integers(0, len(PROFESSIONS), items)]
    gender = np.array([WOMAN, MAN, UNGENDERED])[rng.integers(0, 3, items)]
    z = np.zeros((items, N_FEATURES), np.float32)
    strength = rng.uniform(0.5, 1.5, (items, N_FEATURES)).astype(np.float32)
    z[:, WOMAN_FEATURE] = np.where(gender == WOMAN, 0.5 * strength[:, 0], 0)
    z[:, MAN_FEATURE] = np.where(gender == MAN, 0.5 * strength[:, 1], 0)
    z[:, CONSTANT] = 0.25
    for feature in range(7, N_FEATURES):
        fires = rng.random(items) < rng.uniform(0.05, 0.25)
        z[:, feature] = np.where(fires, 0.8 * strength[:, feature], 0)
    for feature in STEREOTYPE:
        z[:, feature] = np.where(np.isin(profession, STEREOTYPED), 0.45 * strength[:, feature], 0)
    e = z @ rows + rng.normal(size=(items, D)).astype(np.float32) * 0.08
    length = np.linalg.norm(e, axis=1, keepdims=True)
    cases = Cases(
        (e / length).astype(np.float32),
        sp.csr_array((z / length).astype(np.float32)),
        np.zeros(items, bool),
        gender,
        profession,
        np.arange(items),
    )
    means = np.asarray(cases.z.mean(axis=0)).ravel().astype(np.float32)
    return World(cases, gender_axis.astype(np.float32), {Modality.IMAGE: Side(rows, means)})
