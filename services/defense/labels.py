"""Zero-shot labels: the text that an embedding is nearest to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class ZeroShot:
    """The nearest of several texts, of one embedding or of a batch.

    Attributes
    ----------
    index : int array, shape (*batch,)
        Which one.
    probability : float64 array, shape (*batch,)
        Its softmax over all of them, in [0, 1].
    similarity : float64 array, shape (*batch,)
        Cosine, in [-1, 1].
    """

    index: Int[np.ndarray, "*batch"]
    probability: Float[np.ndarray, "*batch"]
    similarity: Float[np.ndarray, "*batch"]


def zero_shot(
    unit: Float[np.ndarray, "*batch d"], texts: Float[np.ndarray, "L d"], logit_scale: float
) -> ZeroShot:
    """Return argmax and softmax of logit_scale <e, t_l> over unit text embeddings t_l."""
    cosines = unit @ texts.T
    best = cosines.max(-1)
    index = np.asarray(cosines.argmax(-1))
    # 1 / sum exp is the softmax of the largest, whose own exponent is 0.
    weights = np.exp(np.float32(logit_scale) * (cosines - best[..., None]))
    return ZeroShot(index, 1.0 / weights.sum(-1, dtype=np.float64), best.astype(np.float64))
