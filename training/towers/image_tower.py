"""The image tower while it trains: trunk, projection, and the standardisation that is folded into it at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from training.compute import mixed

EPS = 1e-5


class ImageTower(nn.Module):
    """The image side of an open_clip model, whose joint embedding is standardised over the batch.

    Without the standardisation (batch normalisation without parameters) the embedding collapses to a dozen directions.

    Parameters
    ----------
    model : open_clip.CLIP
        Its trunk and projection are trained in place.
    mean, std : list[float]
        Of each colour channel, as in the model's preprocessing.
    precision : torch.dtype
        Of the trunk's products.
    """

    def __init__(
        self, model: open_clip.CLIP, mean: list[float], std: list[float], precision: torch.dtype
    ) -> None:
        super().__init__()
        self.trunk, self.projection = model.visual.trunk, model.visual.head.proj
        self.standardise = nn.BatchNorm1d(self.projection.out_features, EPS, 0.05, affine=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.precision = precision

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """Return the trunk's pooled features of images in [0, 1]."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with mixed(images.device, self.precision):
            return self.trunk(x).float()

    def embed(self, features: Float[Tensor, "n width"]) -> Float[Tensor, "n d"]:
        """Return unit embeddings of pooled features."""
        return F.normalize(self.standardise(self.projection(features)), dim=-1)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return unit embeddings of images in [0, 1]."""
        return self.embed(self.features(images))


def build_projector(width: int) -> nn.Sequential:
    """Return what maps pooled features to where the supervised contrastive loss compares them, 128 dimensions."""
    return nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))


def folded(model: Mapping[str, Tensor], tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an open_clip model that embeds images in evaluation as the image tower does.

    Parameters
    ----------
    model : Mapping[str, Tensor]
        Its weights by name; those of the text tower are kept.
    tower : Mapping[str, Tensor]
        Weights of an `ImageTower`, whose standardisation goes into the projection: (W x + b - mean) / std.
    """
    result = dict(model)
    for name, value in tower.items():
        if name.startswith("trunk."):
            result[f"visual.{name}"] = value
    std = (tower["standardise.running_var"] + EPS).sqrt()
    result["visual.head.proj.weight"] = tower["projection.weight"] / std[:, None]
    result["visual.head.proj.bias"] = (tower["projection.bias"] - tower["standardise.running_mean"]) / std
    return result


class WeightAverage:
    """A moving average of a module's weights and statistics.

    Parameters
    ----------
    keep : float
        Share of the average that one update keeps; the first updates keep less, so that the start is forgotten.

    Attributes
    ----------
    values : dict[str, Tensor] or None
        The average by name; None before the first update.
    count : int
        Updates since the last restart.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.restart()

    def restart(self) -> None:
        """Forget: weights of another resolution are nothing to average with."""
        self.values: dict[str, Tensor] | None = None
        self.count = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the module's weights as they are now."""
        now = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        if self.values is None:
            self.values = {name: value.clone() for name, value in now.items()}
        keep = min(self.keep, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.values.values()), list(now.values()), 1 - keep)
        self.count += 1

    def settle(self, module: nn.Module) -> None:
        """Give the module the average, if there is one."""
        if self.values is not None:
            module.load_state_dict(self.values, strict=False)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give the module the average for the length of a block."""
        before = {name: value.clone() for name, value in module.state_dict().items()}
        self.settle(module)
        try:
            yield
        finally:
            module.load_state_dict(before)
