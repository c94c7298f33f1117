"""From detection scores to one calibrated score, a p-value and a threshold at a false positive rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Detector:
    """A logistic model of standardised log scores.

    logit = c + sum_k w_k s_k,  s_k = (log(r_k + f_k) - m_k) / t_k,  w_k >= 0

    Weights are not negative, so that a score can only ever add suspicion: a sign learnt from one attack would be a
    hint to the next one.

    Attributes
    ----------
    names : tuple of str
        The scores r_k, see `services.defense.scores`.
    floor, mean, scale, weight : float64 arrays, shape (k,)
        f, m, t and w.
    bias : float
        c, for as many attacked images as clean ones.
    clean : float64 array, shape (m,)
        Logits of the clean calibration images, ascending.
    """

    names: tuple[str, ...]
    floor: Float[np.ndarray, " k"]
    mean: Float[np.ndarray, " k"]
    scale: Float[np.ndarray, " k"]
    weight: Float[np.ndarray, " k"]
    bias: float
    clean: Float[np.ndarray, " m"]

    def standardise(self, scores: Float[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch k"]:
        """Return s of scores r."""
        result: np.ndarray = (np.log(scores + self.floor) - self.mean) / self.scale
        return result

    def logit(self, scores: Float[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch"]:
        """Return the logit of scores r."""
        result: np.ndarray = self.standardise(scores) @ self.weight + self.bias
        return result

    def p_value(self, logit: float) -> float:
        """Return (1 + clean images with at least this logit) / (1 + clean images), in (0, 1].

        Source: conformal p-values, Vovk et al., "Algorithmic Learning in a Random World" (2005): on clean images
        from where the calibration images come from, P(p <= a) <= a.
        """
        over = len(self.clean) - int(np.searchsorted(self.clean, logit, side="left"))
        return (1 + over) / (1 + len(self.clean))

    def threshold(self, false_positive_rate: float) -> float:
        """Return the smallest logit whose p-value is at most `false_positive_rate`; infinity with too few images."""
        allowed = math.floor(false_positive_rate * (1 + len(self.clean)) + 1e-9)
        if allowed < 1:
            return math.inf
        return float(np.nextafter(self.clean[-allowed], math.inf))


def probability(logit: float) -> float:
    """Return the calibrated score, sigmoid(logit): the probability of an attack at even odds."""
    return 1.0 / (1.0 + math.exp(-logit)) if logit > -700 else 0.0
