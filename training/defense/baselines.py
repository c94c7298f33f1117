"""Other defences of an embedding, to be compared with: each takes pictures or embeddings and returns embeddings."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from training.defense.attacks import ascend, project, random_start
from training.defense.observe import Decoder
from training.defense.victim import Victim


def principal_directions(clean: Float[np.ndarray, "N d"], n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (d,) of clean embeddings and their first directions, shape (kept, d)."""
    mean = clean.mean(0)
    _, _, directions = np.linalg.svd(clean - mean, full_matrices=False)
    return mean, directions[:n_components]


def pca(
    unit: Float[np.ndarray, "B d"], mean: Float[np.ndarray, " d"], directions: Float[np.ndarray, "k d"]
) -> Float[np.ndarray, "B d"]:
    """Project on the principal directions of clean embeddings."""
    return normalise(mean + (unit - mean) @ directions.T @ directions)


def random_features(
    unit: Float[np.ndarray, "B d"],
    z: Float[np.ndarray, "B n"],
    dropped: Int[np.ndarray, " B"],
    decoder: Decoder,
    rng: np.random.Generator,
) -> Float[np.ndarray, "B d"]:
    """Drop so many active features of each image at random and keep the residual: the filter's own null."""
    result = []
    for e, activations, count in zip(unit, z, dropped, strict=True):
        active = np.flatnonzero(activations)
        chosen = rng.choice(active, min(int(count), len(active)), replace=False)
        result.append(e - activations[chosen] @ decoder.rows[chosen])
    return normalise(np.stack(result))


def noise_averaging(
    victim: Victim, images: Float[Tensor, "B 3 H W"], level: float, samples: int, seed: int = 0
) -> Float[np.ndarray, "B d"]:
    """Average the embeddings of noisy copies (Cohen et al., "Randomized smoothing", 2019, without the certificate)."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(images), victim.embed(images[:1]).shape[1])
    for _ in range(samples):
        total += victim.embed((images + level * torch.randn(images.shape, generator=generator)).clamp(0, 1))
    return normalise(total.numpy())


def counterattack(
    victim: Victim,
    images: Float[Tensor, "B 3 H W"],
    *,
    epsilon: float = 4 / 255,
    steps: int = 2,
    drift: float = 0.2,
    growth: float = 2.0,
    seed: int = 0,
) -> Float[np.ndarray, "B d"]:
    """Test-time counterattack: push the picture away from where its embedding is, if it is too stable there.

    Parameters
    ----------
    victim : Victim
        The tower.
    images : float tensor
        In [0, 1].
    epsilon : float
        Budget of the counterattack.
    steps : int
        Gradients.
    drift : float
        tau: a picture whose embedding moves more than this, relatively, under random noise is only given the noise.
    growth : float
        beta: step i has the weight exp(beta i).

    Notes
    -----
    Source: Xing et al., "CLIP is Strong Enough to Fight Back: Test-time Counterattacks towards Zero-shot Adversarial
    Robustness of CLIP" (2025), algorithm 1, with the defaults for budgets up to 4/255.
    """
    start = random_start(images, epsilon, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        original = torch.cat([victim.raw(chunk) for chunk in images.split(32)])
        moved = torch.cat([victim.raw(chunk) for chunk in start.split(32)])
    tau = (moved - original).norm(dim=1) / original.norm(dim=1)
    at, total, weight = start, torch.zeros_like(images), 0.0
    for i in range(1, steps + 1):
        gradients = []
        for chunk, target in zip(at.split(32), original.split(32), strict=True):
            distance = _distance(victim, target)
            gradients.append(ascend(distance, chunk)[1])
        at = project(at + epsilon * torch.cat(gradients).sign(), images, epsilon)
        share = float(np.exp(growth * i))
        total, weight = total + share * (at - images), weight + share
    countered = images + total / weight
    stable = (tau <= drift).view(-1, 1, 1, 1)
    return victim.embed(torch.where(stable, countered, start).clamp(0, 1)).numpy()


def _distance(victim: Victim, target: Tensor):
    return lambda images: F.mse_loss(victim.raw(images), target, reduction="none").sum(1)


def normalise(e: Float[np.ndarray, "B d"]) -> Float[np.ndarray, "B d"]:
    """Return unit rows."""
    result: np.ndarray = e / np.linalg.norm(e, axis=1, keepdims=True)
    return result
