"""The detection scores, one formula a function, of one image or of a batch. Larger is more suspicious for each.

r4, the noise, is `services.defense.smoothing.noise`: it is of the pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from services.defense.features import FeatureStatistics, Look

# In the order of a detector's weights; the first four cost no forward but the one that encodes.
ONE_LOOK = ("reconstruction_error", "text_share", "moved_share", "noise")
TWO_LOOKS = (*ONE_LOOK, "instability")

# Range of the smoothing of the second look, in units of the pixel range: above budgets of 8/255, below the edges of
# drawings.
SIGMA = 20 / 255


def decode(
    indices: Int[np.ndarray, " m"],
    values: Float[np.ndarray, "*batch m"],
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
) -> Float[np.ndarray, "*batch d"]:
    """Return e_hat = z D + b of sparse activations z."""
    result: np.ndarray = values @ rows[indices] + origin
    return result


def reconstruction_error(
    look: Look, rows: Float[np.ndarray, "n d"], origin: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "*batch"]:
    """Return r1 = |e - (z D + b)|."""
    result: np.ndarray = np.linalg.norm(look.unit - decode(look.indices, look.values, rows, origin), axis=-1)
    return result


def text_share(look: Look, statistics: FeatureStatistics) -> Float[np.ndarray, "*batch"]:
    """Return r2 = sum over TEXT features of z_j^2 / sum z^2; 0 where nothing is active."""
    return _share(look, statistics.text)


def moved_share(look: Look, statistics: FeatureStatistics) -> Float[np.ndarray, "*batch"]:
    """Return r3 = sum over the features that attacks move of z_j^2 / sum z^2; 0 where nothing is active."""
    return _share(look, statistics.moved)


def _share(look: Look, features: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "*batch"]:
    result: np.ndarray = look.energy() @ features[look.indices].astype(np.float64)
    return result


def instability(look: Look, smoothed: Look) -> Float[np.ndarray, "*batch"]:
    """Return r5 = 1 - <e, e~>, e~ the embedding of the smoothed picture."""
    result: np.ndarray = 1.0 - (look.unit.astype(np.float64) * smoothed.unit.astype(np.float64)).sum(-1)
    return result


def detection_scores(
    look: Look,
    noise: float | Float[np.ndarray, "*batch"],
    smoothed: Look | None,
    statistics: FeatureStatistics,
    rows: Float[np.ndarray, "n d"],
    origin: Float[np.ndarray, " d"],
) -> Float[np.ndarray, "*batch k"]:
    """Return the scores, float64, in the order of `ONE_LOOK`, or of `TWO_LOOKS` with that of the smoothed picture."""
    scores = [
        reconstruction_error(look, rows, origin),
        text_share(look, statistics),
        moved_share(look, statistics),
        np.asarray(noise),
    ]
    if smoothed is not None:
        scores.append(instability(look, smoothed))
    return np.stack(scores, axis=-1).astype(np.float64)
