"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024).

PyTorch's own does its matrix products in bfloat16, which a CPU without such instructions emulates at a tenth of the
speed; this one does them in the precision it is told and takes convolutions as matrices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Quintic whose iteration brings all singular values near 1 in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(
    matrix: Float[Tensor, "rows columns"], rounds: int = 5, precision: torch.dtype = torch.float32
) -> Float[Tensor, "rows columns"]:
    """Return about U V^T of the singular value decomposition U S V^T, by Newton-Schulz iteration in `precision`.

    Singular values of the result lie between about 0.7 and 1.2, not at 1: enough, and cheaper.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / x.norm().clamp(min=1e-7)).to(precision)
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, with decoupled weight decay.

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        Matrices and convolutions; the latter count as matrices of output channels by everything else.
    lr : float
        Scaled so that an update has about the size of AdamW's at the same rate (Liu et al., 2025).
    momentum : float
        Of the Nesterov momentum.
    weight_decay : float
        Decoupled.
    precision : torch.dtype
        Of the products of the orthogonalisation, which bfloat16 is good enough for.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step; gradients must be there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                blended = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                scale = 0.2 * max(blended.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonalised(blended, precision=self.precision).view(parameter.shape)
                parameter.sub_(step, alpha=group["lr"] * scale)
