"""Fitting the detector: logistic regression whose weights are not negative."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit

from services.defense.detector import Detector


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
    # The scale of attacked images: what is far under it is equally clean, and an order of magnitude there must not
    # outweigh the difference between a JPEG and an attack.
    both = np.concatenate([clean, attacked])
    floor = np.maximum(np.median(attacked, axis=0), 1e-4)
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
