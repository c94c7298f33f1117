"""From scores to labels, and how far labels agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from services.modality.scores import Floats
from services.modality.tables import Label

# The interval covers the truth at least 93 times in 100 from 4 units on (tests/services/test_modality_numbers.py
# simulates it), but with fewer than 10 one more unit would move the score by a tenth or more. A feature with energy on
# one side alone needs 13: the exact interval of 12 out of 12 reaches below 0.75.
MIN_UNITS = 10


def label_features(
    mds_low: Floats,
    mds_high: Floats,
    significant: NDArray[np.bool_],
    units: NDArray[np.int64],
    delta: float = 0.25,
) -> NDArray[np.str_]:
    """Label features by the interval of their energy MDS and the significance of their co-activation.

    ========== =====================================================================
    DEAD       never active
    UNRESOLVED active in fewer than `MIN_UNITS` pairs, or in groups of them
    IMAGE      the interval lies above 0.5 + delta
    TEXT       the interval lies below 0.5 - delta
    CROSS      the interval lies within 0.5 +- delta, and co-activation is significant
    UNRESOLVED anything else
    ========== =====================================================================

    Parameters
    ----------
    mds_low, mds_high : float64 arrays, shape (n,)
        The interval.
    significant : bool array, shape (n,)
        Whether both sides of a pair fire together more than by chance.
    units : int array, shape (n,)
        See `services.modality.scores.active_units`.
    delta : float
        In (0, 0.5).

    Returns
    -------
    str array, shape (n,)
        Values of `Label`.
    """
    within = (mds_low >= 0.5 - delta) & (mds_high <= 0.5 + delta)
    rules = {
        Label.DEAD: units == 0,
        Label.UNRESOLVED: units < MIN_UNITS,
        Label.IMAGE: mds_low > 0.5 + delta,
        Label.TEXT: mds_high < 0.5 - delta,
        Label.CROSS: within & significant,
    }
    # The first that holds.
    return np.select(list(rules.values()), [label.value for label in rules], Label.UNRESOLVED.value)


def paper_labels(mds: Floats) -> NDArray[np.str_]:
    """Label features by the paper's rule: TEXT below mu - sigma, IMAGE above mu + sigma, else CROSS.

    mu and sigma are the mean and standard deviation of the paper's MDS over the features that fire; a NaN is
    DEAD.
    """
    alive = ~np.isnan(mds)
    if not alive.any():
        return np.full(mds.shape, Label.DEAD.value)
    mean, deviation = mds[alive].mean(), mds[alive].std()
    return np.select(
        [~alive, mds < mean - deviation, mds > mean + deviation],
        [Label.DEAD.value, Label.TEXT.value, Label.IMAGE.value],
        Label.CROSS.value,
    )


def cohen_kappa(first: NDArray[np.str_], second: NDArray[np.str_]) -> float:
    """Return Cohen's kappa = (p_o - p_e) / (1 - p_e) of two labellings of the same features.

    p_o is the share of equal labels and p_e the share expected by chance from the two marginals. NaN where
    chance alone would always agree (both labellings constant and equal), or there is nothing to compare.
    """
    return float(_kappa(_confusion(first, second).astype(np.float64)[None])[0])


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two labellings.

    Attributes
    ----------
    kappa, low, high : float
        With its bootstrap interval over features.
    features : int
        Features compared.
    """

    kappa: float
    low: float
    high: float
    features: int


def label_agreement(
    first: NDArray[np.str_],
    second: NDArray[np.str_],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Return Cohen's kappa with a bootstrap interval over features.

    Features that are DEAD in both labellings are left out: agreeing that nothing fires is no evidence. The
    bootstrap draws the confusion matrix, which is all that kappa depends on.
    """
    compared = (first != Label.DEAD.value) | (second != Label.DEAD.value)
    first, second = first[compared], second[compared]
    if len(first) == 0:
        return Agreement(np.nan, np.nan, np.nan, 0)
    table = _confusion(first, second)
    draws = np.random.default_rng(seed).multinomial(len(first), table.ravel() / table.sum(), size=resamples)
    kappas = _kappa(draws.reshape(resamples, *table.shape).astype(np.float64))
    kappas = kappas[~np.isnan(kappas)]
    tail = (1 - level) / 2
    low, high = np.quantile(kappas, [tail, 1 - tail]) if len(kappas) else (np.nan, np.nan)
    return Agreement(cohen_kappa(first, second), float(low), float(high), len(first))


def _confusion(first: NDArray[np.str_], second: NDArray[np.str_]) -> NDArray[np.int64]:
    names, codes = np.unique(np.concatenate([first, second]), return_inverse=True)
    rows, columns = codes[: len(first)], codes[len(first) :]
    counts = sp.coo_array((np.ones(len(rows), np.int64), (rows, columns)), shape=(len(names), len(names)))
    return np.asarray(counts.toarray())


def _kappa(tables: Floats) -> Floats:
    """Kappa of each confusion matrix, shape (R, c, c) to (R,)."""
    total = tables.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        agreed = np.trace(tables, axis1=1, axis2=2) / total
        chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1) / total**2
        return np.where(chance < 1, (agreed - chance) / (1 - chance), np.nan)
