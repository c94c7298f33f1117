"""What the study compares: feature ablations, and what does without features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from services.bias.ablation import Mode, Side
from services.bias.gender import unit
from services.bias.leace import Leace
from services.bias.plan import Plan
from services.dictionaries import Dictionary
from services.modality.modalities import Modality
from services.modality.tables import Label
from training.bias.counterparts import SUBSPACES

LABELS = (Label.IMAGE, Label.TEXT, Label.CROSS)
TOP = (4, 8, 16, 32, 64, 128, 256)
MODES = (Mode.ZERO, Mode.MEAN, Mode.PROJECT)
COMPONENTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Method:
    """One thing to do to embeddings.

    Attributes
    ----------
    name : str
        For tables.
    plan : Plan
        What does it; its features are None for what uses none.
    """

    name: str
    plan: Plan

    @property
    def features(self) -> int:
        """Features in the set."""
        return 0 if self.plan.features is None else len(self.plan.features)


class RoundTrip:
    """e' = norm(decode(encode(e))): what the dictionary alone does to gender, nothing ablated."""

    def __init__(self, dictionary: Dictionary, modality: Modality) -> None:
        self._dictionary, self._modality = dictionary, modality

    @torch.no_grad()
    def __call__(self, e: np.ndarray, z: sp.csr_array) -> np.ndarray:
        """Return the reconstructions of `e`."""
        return unit(self._dictionary.reconstruct(torch.from_numpy(e), self._modality).numpy())


class WithoutSpan:
    """e' = norm((I - U U^T) e) for directions U that are no features."""

    def __init__(self, directions: np.ndarray) -> None:
        self._basis = np.linalg.qr(directions.T.astype(np.float64))[0].astype(np.float32)

    def __call__(self, e: np.ndarray, z: sp.csr_array) -> np.ndarray:
        """Return `e` without the directions."""
        return unit(e - (e @ self._basis) @ self._basis.T)


def feature_methods(sides: Mapping[Modality, Side], labels: np.ndarray, rank: np.ndarray) -> list[Method]:
    """Return ablations by label and by gender association, in every mode."""
    sets = [(f"label {label.value}", np.flatnonzero(labels == label.value)) for label in LABELS]
    sets += [(f"top {q}", np.sort(rank[:q])) for q in TOP if q < len(rank)]
    return [
        Method(f"{name}, {mode.value}", Plan.of_features(sides, features, mode))
        for name, features in sets
        if len(features)
        for mode in MODES
    ]


def reference_methods(
    dictionary: Dictionary,
    direction: np.ndarray,
    leace: Mapping[Modality, Leace],
    fitted: Mapping[Modality, tuple[np.ndarray, np.ndarray]],
    counterparts: Mapping[Modality, np.ndarray],
) -> list[Method]:
    """Return what needs no features.

    Parameters
    ----------
    dictionary : Dictionary
        For the round trip.
    direction : float array, shape (d,)
        t_F - t_M.
    leace : mapping
        Erasers by modality.
    fitted : mapping
        Embeddings, (N, d), and "is a woman", (N,), of the gendered items that PCA is fitted on, by modality.
    counterparts : mapping
        The gender subspace of counterparts, (size, d), by modality.
    """
    methods = [
        Method("round trip", Plan(Mode.ZERO, {m: RoundTrip(dictionary, m) for m in Modality})),
        Method("score direction", Plan(Mode.PROJECT, {m: WithoutSpan(direction[None]) for m in Modality})),
        Method("LEACE", Plan(Mode.LEACE, leace)),
    ]
    components = {m: gender_components(*fitted[m]) for m in Modality}
    methods += [
        Method(f"PCA {q}", Plan(Mode.PROJECT, {m: WithoutSpan(components[m][:q]) for m in Modality}))
        for q in COMPONENTS
    ]
    methods += [
        Method(
            f"counterparts {q}", Plan(Mode.PROJECT, {m: WithoutSpan(counterparts[m][:q]) for m in Modality})
        )
        for q in SUBSPACES
    ]
    return methods


def gender_components(e: np.ndarray, woman: np.ndarray, among: int = 32) -> np.ndarray:
    """Return the first principal components, those along which the genders differ most first, (among, d)."""
    centred = e.astype(np.float64) - e.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:among]
    along = centred @ axes.T
    gap = np.abs(along[woman].mean(0) - along[~woman].mean(0)) / along.std(0)
    return axes[np.argsort(-gap)].astype(np.float32)
