"""An ablation of both modalities, and what it leaves of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from services.bias.ablation import Ablator, FeatureAblation, Mode, Side
from services.bias.cases import Cases
from services.check import Check, nothing
from services.modality.modalities import Modality

# Items that neighbours are looked for among, drawn at random from more: the time grows with their square.
NEIGHBOUR_ITEMS = 2_000
NEIGHBOURS = 10


@dataclass(frozen=True)
class Plan:
    """An ablation of both modalities.

    Attributes
    ----------
    mode : Mode
        How.
    ablators : mapping of Modality to Ablator
        What does it.
    features : int array or None
        S; None for an ablation without features.
    """

    mode: Mode
    ablators: Mapping[Modality, Ablator]
    features: Int[np.ndarray, " s"] | None = None

    @classmethod
    def of_features(cls, sides: Mapping[Modality, Side], features: Int[np.ndarray, " s"], mode: Mode) -> Plan:
        """Return the ablation of `features` in each of `sides`."""
        ablators = {modality: FeatureAblation(side, features, mode) for modality, side in sides.items()}
        return cls(mode, ablators, features)

    def apply(self, cases: Cases) -> Float[np.ndarray, "n d"]:
        """Return the embeddings of `cases` after the ablation."""
        result = np.empty_like(cases.e)
        for modality, ablator in self.ablators.items():
            rows = np.flatnonzero(cases.is_text == (modality is Modality.TEXT))
            if len(rows):
                result[rows] = ablator(cases.e[rows], cases.z[rows])
        return result


def neighbours_kept(
    e: Float[np.ndarray, "n d"], after: Float[np.ndarray, "n d"], seed: int, check: Check = nothing
) -> float:
    """Return the mean share of each item's nearest items that stay nearest; on NEIGHBOUR_ITEMS at most.

    `check` is called before each search.
    """
    if len(e) > NEIGHBOUR_ITEMS:
        chosen = np.random.default_rng(seed).permutation(len(e))[:NEIGHBOUR_ITEMS]
        e, after = e[chosen], after[chosen]
    count = min(NEIGHBOURS, len(e) - 1)
    near = []
    for x in (e, after):
        check()
        similarity = x @ x.T
        np.fill_diagonal(similarity, -np.inf)
        near.append(np.argpartition(-similarity, count - 1, axis=1)[:, :count])
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True)]
    return float(np.mean(shared) / count)
