"""Attacks on images within a budget epsilon of the maximum norm, one function each.

All of them change images in [0, 1], shape (B, 3, H, W), and return images of the same shape within epsilon and
within [0, 1]. The loss is what the attacker wants to be large, one value an image. ``tests/training/
test_defense_attacks.py`` compares `pgd` and `apgd` with the Adversarial Robustness Toolbox.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from training.defense.victim import Embed

# From images to one value an image, which the attack makes large.
Loss: TypeAlias = Callable[[Tensor], Tensor]


def untargeted(embed: Embed, texts: Float[Tensor, "L d"], truth: Int[Tensor, " B"], scale: float) -> Loss:
    """Return the cross-entropy of the true label among `texts`: large where another label wins."""

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(scale * embed(images) @ texts.T, truth, reduction="none")

    return loss


def feature_matching(embed: Embed, target: Float[Tensor, "B d"]) -> Loss:
    """Return the cosine with the embedding of a text that each image is to be taken for."""

    def loss(images: Tensor) -> Tensor:
        return (embed(images) * target).sum(-1)

    return loss


def ascend(loss: Loss, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each image, shape (B,), and its gradient, in the images' shape."""
    leaf = images.detach().requires_grad_(True)
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def project(images: Tensor, origin: Tensor, epsilon: float) -> Tensor:
    """Return the nearest images within epsilon of `origin` (maximum norm) and within [0, 1]."""
    return torch.minimum(torch.maximum(images, origin - epsilon), origin + epsilon).clamp(0, 1)


def random_start(images: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Return images moved to a uniform random place of the budget."""
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    return project(images + epsilon * noise, images, epsilon)


def pgd(
    loss: Loss,
    images: Float[Tensor, "B 3 H W"],
    epsilon: float,
    *,
    steps: int = 20,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B 3 H W"]:
    """Projected gradient descent with signed steps from a random start.

    Parameters
    ----------
    loss : callable
        To be made large.
    images : float tensor
        In [0, 1].
    epsilon : float
        Budget, in units of the pixel range.
    steps : int
        Gradients an image.
    step_size : float or None
        In the same units; None takes 2.5 epsilon / steps, which can cross the budget within the steps.
    generator : torch.Generator or None
        Of the start; None starts at the image.

    Notes
    -----
    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (2018), section 4.
    """
    step = 2.5 * epsilon / steps if step_size is None else step_size
    moved = images if generator is None else random_start(images, epsilon, generator)
    for _ in range(steps):
        _, gradient = ascend(loss, moved)
        moved = project(moved + step * gradient.sign(), images, epsilon)
    return moved.detach()


def checkpoints(steps: int) -> list[int]:
    """Return the steps at which APGD may halve its step size: p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1.0:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [-(-round(share * steps * 1e6) // 1_000_000) for share in shares[1:] if share <= 1.0]


def apgd(
    loss: Loss,
    images: Float[Tensor, "B 3 H W"],
    epsilon: float,
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
    momentum: float = 0.75,
    progress: float = 0.75,
) -> Float[Tensor, "B 3 H W"]:
    """Auto-PGD: momentum, and a step that halves where an image stops improving; returns the best images seen.

    Parameters
    ----------
    loss, images, epsilon, steps, generator
        As for `pgd`. With the cross-entropy for a loss this is APGD-CE.
    momentum : float
        alpha, the weight of the new step against the last one.
    progress : float
        rho, the share of steps that must have raised the loss between two checkpoints.

    Notes
    -----
    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks" (2020), algorithm 1.
    """
    at = random_start(images, epsilon, generator) if generator is not None else images.clone()
    value, gradient = ascend(loss, at)
    best, best_value, best_gradient = at.clone(), value.clone(), gradient.clone()
    step = torch.full((len(images), 1, 1, 1), 2 * epsilon)
    before = at
    raised = torch.zeros(len(images))
    last_check, halved, value_at_check = 0, torch.ones(len(images), dtype=torch.bool), best_value.clone()
    checks = set(checkpoints(steps))
    for k in range(1, steps + 1):
        target = project(at + step * gradient.sign(), images, epsilon)
        weight = momentum if k > 1 else 1.0
        at, before = (
            project(at + weight * (target - at) + (1 - weight) * (at - before), images, epsilon),
            at,
        )
        previous = value
        value, gradient = ascend(loss, at)
        raised += (value > previous).float()
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best[better], best_gradient[better] = at[better], gradient[better]
        if k in checks:
            stuck = raised < progress * (k - last_check)
            stalled = ~halved & (best_value <= value_at_check)
            halve = stuck | stalled
            step[halve] /= 2
            at, gradient = at.clone(), gradient.clone()
            at[halve], gradient[halve] = best[halve], best_gradient[halve]
            value = torch.where(halve, best_value, value)
            halved, value_at_check, last_check = halve, best_value.clone(), k
            raised.zero_()
    return best.detach()
