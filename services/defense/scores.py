"""The detection scores, one formula a function. Larger is more suspicious for each.

r4, the noise, is `services.defense.smoothing.noise`: it is of the pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from services.defense.features import FeatureStatistics, Look

# In the order of a detector's weights; the first four cost no forward but the one that encodes.
ONE_LOOK = ("reconstruction_error", "text_share", "moved_share", "noise")
TWO_LOOKS = (*ONE_LOOK, "instability")

# Range of the smoothing of the second look, in units of the pixel range: above budgets of 8/255, below the edges of
# drawings.
SIGMA = 20 / 255


def decode(
    indices: Int[np.ndarray, " m"],
    values: Float[np.ndarray, " m"],
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
) -> Float[np.ndarray, " d"]:
    """Return e_hat = z D + b of sparse activations z."""
    result: np.ndarray = values @ rows[indices] + origin
    return result


def reconstruction_error(
    look: Look, rows: Float[np.ndarray, "n d"], origin: Float[np.ndarray, " d"]
) -> float:
    """Return r1 = |e - (z D + b)|."""
    return float(np.linalg.norm(look.unit - decode(look.indices, look.values, rows, origin)))


def text_share(look: Look, statistics: FeatureStatistics) -> float:
    """Return r2 = sum over TEXT features of z_j^2 / sum z^2; 0 where nothing is active."""
    return float(look.energy()[statistics.text[look.indices]].sum())


def moved_share(look: Look, statistics: FeatureStatistics) -> float:
    """Return r3 = sum over the features that attacks move of z_j^2 / sum z^2; 0 where nothing is active."""
    return float(look.energy()[statistics.moved[look.indices]].sum())


def instability(look: Look, twin: Look) -> float:
    """Return r5 = 1 - <e, e~>, e~ the embedding of the smoothed picture."""
    return float(1.0 - look.unit.astype(np.float64) @ twin.unit.astype(np.float64))


def detection_scores(
    look: Look,
    noise: float,
    twin: Look | None,
    statistics: FeatureStatistics,
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
) -> Float[np.ndarray, " k"]:
    """Return the scores of one image, float64, in the order of `ONE_LOOK`, or of `TWO_LOOKS` with a twin."""
    scores = [
        reconstruction_error(look, rows, origin),
        text_share(look, statistics),
        moved_share(look, statistics),
        noise,
    ]
    if twin is not None:
        scores.append(instability(look, twin))
    return np.array(scores)
