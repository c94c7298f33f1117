"""The gender score of an embedding: how much nearer it is to the prompts of a woman than to those of a man."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def unit(x: Float[np.ndarray, "batch d"]) -> Float[np.ndarray, "batch d"]:
    """Return rows of length 1; a row of zeros stays one."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    result: NDArray[np.float32] = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    return result


def gender_direction(
    woman: Float[np.ndarray, "prompts d"], man: Float[np.ndarray, "prompts d"]
) -> Float[np.ndarray, " d"]:
    """Return t_F - t_M, each t the normalised mean of its prompts' unit embeddings, float32."""
    t_woman, t_man = (unit(prompts.mean(axis=0, keepdims=True))[0] for prompts in (woman, man))
    direction: NDArray[np.float32] = (t_woman - t_man).astype(np.float32)
    return direction


def gender_scores(
    e: Float[np.ndarray, "batch d"], direction: Float[np.ndarray, " d"]
) -> Float[np.ndarray, " batch"]:
    """Return s = <e, t_F - t_M> of unit embeddings: in [-2, 2], above 0 towards woman, float64."""
    return np.asarray(e @ direction, dtype=np.float64)


def probability(
    scores: Float[np.ndarray, " batch"], logit_scale: float, threshold: float = 0.0
) -> Float[np.ndarray, " batch"]:
    """Return P(F) = sigmoid(logit_scale (s - threshold)), the towers' softmax over the two prompts at threshold 0.

    Parameters
    ----------
    scores : float array, shape (B,)
        From `gender_scores`.
    logit_scale : float
        The towers' factor on cosines, already exponentiated.
    threshold : float
        Score at which both genders are equally likely.
    """
    # The sigmoid by tanh: no overflow, however large the logit.
    return np.asarray(0.5 + 0.5 * np.tanh(logit_scale / 2 * (scores - threshold)), dtype=np.float64)
