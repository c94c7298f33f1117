"""`score_pairs`: activations of image-text pairs in, a modality table out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.check import Check, nothing
from services.errors import NotEnoughPairs
from services.modality.coactivation import benjamini_hochberg, coactivation
from services.modality.labels import Agreement, label_agreement, label_features, paper_labels
from services.modality.scores import (
    Activations,
    active_units,
    bootstrap_mds,
    compact,
    energies,
    energy_mds,
    firing_rates,
    paper_mds,
)
from services.modality.tables import ModalityTable

MIN_PAIRS = 2


@dataclass(frozen=True)
class ModalitySettings:
    """How features are scored and labelled.

    Attributes
    ----------
    delta : float
        In (0, 0.5): how far from 0.5 the interval of the MDS must lie for IMAGE or TEXT, and within for
        CROSS.
    resamples : int
        Bootstrap resamples of the interval.
    shuffles : int
        Shuffles of the co-activation test, at least.
    level : float
        In (0, 1): coverage of the interval.
    fdr : float
        In (0, 1): false discovery rate of significant co-activation.
    seed : int
        Of resamples and shuffles.
    """

    delta: float = 0.25
    resamples: int = 1000
    shuffles: int = 1000
    level: float = 0.95
    fdr: float = 0.05
    seed: int = 0


DEFAULT_SETTINGS = ModalitySettings()


def score_pairs(
    z_image: Activations,
    z_text: Activations,
    settings: ModalitySettings = DEFAULT_SETTINGS,
    groups: NDArray[np.int64] | None = None,
    check: Check = nothing,
) -> ModalityTable:
    """Score and label every feature of a dictionary on image-text pairs.

    Parameters
    ----------
    z_image, z_text : activations, shape (N, n)
        Dense float32 or sparse (see `stack_rows`); row i of both is one true pair.
    settings : ModalitySettings
        How.
    groups : int array, shape (N,), or None
        Pairs that are not independent (several drawings of one concept) share a number: intervals and the
        test of co-activation then count groups, not pairs.
    check : callable
        Called between steps; what it raises ends the scoring.

    Returns
    -------
    ModalityTable
        Without names and monosemanticity, which need more than activations.

    Raises
    ------
    NotEnoughPairs
        With fewer than two pairs.
    """
    if z_image.shape != z_text.shape:
        raise ValueError(f"images {z_image.shape} and texts {z_text.shape} do not pair up")
    if z_image.shape[0] < MIN_PAIRS:
        raise NotEnoughPairs(f"{z_image.shape[0]} pairs; at least {MIN_PAIRS} are needed")
    image, text = compact(z_image), compact(z_text)
    energy_image, energy_text = energies(image), energies(text)
    mds = energy_mds(energy_image, energy_text)
    low, high = bootstrap_mds(
        image,
        text,
        resamples=settings.resamples,
        level=settings.level,
        seed=settings.seed,
        groups=groups,
        check=check,
    )
    correlation, p = coactivation(
        image, text, shuffles=settings.shuffles, seed=settings.seed, groups=groups, check=check
    )
    q = benjamini_hochberg(p)
    significant = (np.nan_to_num(q, nan=1.0) <= settings.fdr) & (np.nan_to_num(correlation) > 0)
    paper, pairs = paper_mds(image, text)
    return ModalityTable.from_columns(
        {
            "label": label_features(
                low, high, significant, active_units(image, text, groups), settings.delta
            ),
            "mds_energy": mds,
            "mds_energy_low": low,
            "mds_energy_high": high,
            "mds_paper": paper,
            "paper_label": paper_labels(paper),
            "paper_pairs": pairs,
            "coactivation": correlation,
            "coactivation_p": p,
            "coactivation_q": q,
            "coactivation_significant": significant,
            "firing_rate_image": firing_rates(image),
            "firing_rate_text": firing_rates(text),
            "energy_image": energy_image,
            "energy_text": energy_text,
        },
        z_image.shape[1],
    )


def split_half_agreement(
    z_image: Activations,
    z_text: Activations,
    settings: ModalitySettings = DEFAULT_SETTINGS,
    groups: NDArray[np.int64] | None = None,
) -> Agreement:
    """Label the features on two random halves of the pairs, and return how far the labels agree.

    Groups are kept whole, so that the halves share no concept.
    """
    n_pairs = z_image.shape[0]
    units = np.arange(n_pairs) if groups is None else np.unique(groups, return_inverse=True)[1]
    rng = np.random.default_rng(settings.seed)
    first_half = (rng.permutation(units.max() + 1) % 2 == 0)[units]
    labels = [
        score_pairs(z_image[half], z_text[half], settings, None if groups is None else groups[half]).label
        for half in (np.flatnonzero(first_half), np.flatnonzero(~first_half))
    ]
    return label_agreement(
        labels[0], labels[1], resamples=settings.resamples, level=settings.level, seed=settings.seed
    )
