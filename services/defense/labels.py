"""Zero-shot labels: the text that an embedding is nearest to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class ZeroShot:
    """The nearest of several texts.

    Attributes
    ----------
    index : int
        Which one.
    probability : float
        Its softmax over all of them, in [0, 1].
    similarity : float
        Cosine, in [-1, 1].
    """

    index: int
    probability: float
    similarity: float


def zero_shot(unit: Float[np.ndarray, " d"], texts: Float[np.ndarray, "L d"], logit_scale: float) -> ZeroShot:
    """Return argmax and softmax of logit_scale <e, t_l> over unit text embeddings t_l."""
    cosines = (texts @ unit).astype(np.float64)
    best = int(np.argmax(cosines))
    weights = np.exp(logit_scale * (cosines - cosines[best]))
    return ZeroShot(best, float(1.0 / weights.sum()), float(cosines[best]))
