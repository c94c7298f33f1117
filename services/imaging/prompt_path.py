"""The prompt path: a change of the text embedding, carried into the text tower's hidden states.

Stable Diffusion 1.x reads the final hidden states h of CLIP's own text tower, of which the embedding is a
projection, e = W h_EOS. The change with the least norm that moves e by delta e is

    delta h = W^T (W W^T + lambda I)^-1 delta e

(ridge, so that directions that W hardly uses do not blow up). It is exact for the end token alone; added to
the end token and the padding, which follow it under causal attention and hold the same summary, it steers the
picture. The start token, an attention sink that never sees the prompt, stays as it is, and so do the words.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Relative to the mean eigenvalue of W W^T. Small: it only has to tame directions that W nearly ignores.
RIDGE = 1e-3


def hidden_change(
    projection: Float[Tensor, "d width"], change: Float[Tensor, " d"], ridge: float = RIDGE
) -> Float[Tensor, " width"]:
    """Return delta h for delta e.

    Parameters
    ----------
    projection : float tensor, shape (d, width)
        W, from hidden states to embeddings.
    change : float tensor, shape (d,)
        delta e, unnormalised: rho times the change of the unit embedding.
    ridge : float
        lambda, relative to the mean eigenvalue of W W^T.
    """
    w = projection.double()
    gram = w @ w.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    moved: Tensor = w.T @ torch.linalg.solve(gram, change.double())
    return moved.float()


def steered_hidden_states(
    hidden: Float[Tensor, "length width"], end: int, change: Float[Tensor, " width"]
) -> Float[Tensor, "length width"]:
    """Add `change` from the end token on, and give each token its norm back.

    Parameters
    ----------
    hidden : float tensor, shape (length, width)
        Final hidden states of a prompt.
    end : int
        Position of the end token, at least 1: the start token is never touched.
    change : float tensor, shape (width,)
        delta h.
    """
    if not torch.any(change):
        return hidden
    steered = hidden.clone()
    tail = hidden[end:]
    moved = tail + change
    steered[end:] = moved * (tail.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
    return steered
