"""The kernel inception distance of two sets of pictures.

The features are EfficientNet-Lite0's with its ImageNet weights, which come as a package: InceptionV3 does not. Figures
compare within this project, not with published KIDs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Kid:
    """Kernel inception distance, times 1,000, with its 95% bootstrap interval over pictures of both sets."""

    value: float
    low: float
    high: float


def kid(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], resamples: int = 200, seed: int = 0) -> Kid:
    """Return the unbiased squared MMD of two sets of features under the kernel (x.y / d + 1)^3.

    Binkowski et al. (2018), equation 4. Features are scaled to unit mean square first, as the kernel expects of
    InceptionV3's. A resample's repeated pictures would count as equal pairs, so pairs of one picture are left out.
    """
    scale = np.sqrt(np.square(np.concatenate([a, b])).mean())
    x, y = a.astype(np.float64) / scale, b.astype(np.float64) / scale
    d = x.shape[1]
    kxx, kyy, kxy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(kxx, 0.0)
    np.fill_diagonal(kyy, 0.0)
    rng = np.random.default_rng(seed)

    def mmd(u: np.ndarray, v: np.ndarray) -> float:
        within = [w @ k @ w / (w.sum() ** 2 - np.square(w).sum()) for w, k in ((u, kxx), (v, kyy))]
        return float(sum(within) - 2 * (u @ kxy @ v) / (u.sum() * v.sum()))

    draws = [
        mmd(*(rng.multinomial(n, np.full(n, 1 / n)).astype(float) for n in (len(x), len(y))))
        for _ in range(resamples)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Kid(1000 * mmd(np.ones(len(x)), np.ones(len(y))), 1000 * float(low), 1000 * float(high))
