"""From detection scores to one calibrated score, a p-value and a threshold at a false positive rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit


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
    return float(expit(logit))


def fit_detector(
    names: Sequence[str],
    clean: Float[np.ndarray, "clean k"],
    attacked: Float[np.ndarray, "attacked k"],
    thresholds_on: Float[np.ndarray, "m k"],
    *,
    penalty: float = 1e-2,
) -> Detector:
    """Fit a detector.

    Parameters
    ----------
    names : sequence of str
        Of the scores.
    clean, attacked : float64 arrays
        Scores of clean and of attacked images; the two classes weigh the same whatever their numbers.
    thresholds_on : float64 array
        Scores of clean images that set the thresholds.
    penalty : float
        Of the squared weights, which keeps logits finite where the classes can be told apart perfectly.

    Returns
    -------
    Detector
        That minimises the mean cross-entropy + penalty |w|^2 with w >= 0.
    """
    # A tenth of the median over everything seen: low enough to keep the order, high enough that a score of zero
    # is an ordinary value and not minus infinity.
    both = np.concatenate([clean, attacked])
    floor = np.maximum(np.median(both, axis=0) / 10, 1e-4)
    logs = np.log(clean + floor)
    mean, scale = logs.mean(0), np.maximum(logs.std(0), 1e-3)
    s = (np.log(both + floor) - mean) / scale
    y = np.r_[np.zeros(len(clean)), np.ones(len(attacked))]
    share = np.where(y == 1, 0.5 / len(attacked), 0.5 / len(clean))

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, c = theta[:-1], theta[-1]
        logit = s @ w + c
        loss = share @ (np.logaddexp(0, logit) - y * logit) + penalty * w @ w
        slope = share * (expit(logit) - y)
        return float(loss), np.r_[s.T @ slope + 2 * penalty * w, slope.sum()]

    k = clean.shape[1]
    start = np.zeros(k + 1)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * k + [(None, None)])
    detector = Detector(tuple(names), floor, mean, scale, found.x[:-1], float(found.x[-1]), np.zeros(0))
    return Detector(
        detector.names, floor, mean, scale, detector.weight, detector.bias,
        np.sort(detector.logit(thresholds_on)),
    )  # fmt: skip
