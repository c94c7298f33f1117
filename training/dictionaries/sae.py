"""Fit TopK sparse autoencoders on embeddings of both modalities.

    loss = ||e_I - e_I_hat||^2 + ||e_T - e_T_hat||^2  (as shares of the variance)
         + aux / 32 * (residual explained by dead features)
         + group * sum_j sqrt(zI_j^2 + zT_j^2) / sqrt(2 k)
         + align * InfoNCE(zI, zT)

Source: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), for TopK and AuxK. The last two terms, and a
random mask of features shared by both sides of a pair, are ways to make one concept one feature in both modalities
("group" dictionaries); without them it is a plain autoencoder. The recipe that ships uses the last term alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, ward
from torch import Tensor

from services.dictionaries import SAE, Modality
from training.dictionaries.sparse_code import combine, select

IMAGE, TEXT = Modality.IMAGE, Modality.TEXT
# Directions that are clustered at once: their distances take 4 bytes for each two of them, 128 MB.
CLUSTERED = 8_000
# Length of the random part of a decoder row at the start, beside the direction it starts from; and where another row
# has that direction already.
START_NOISE, REPEATED_NOISE = 0.05, 0.5


@dataclass(frozen=True)
class SAESettings:
    """Hyperparameters of one autoencoder.

    Parameters
    ----------
    n_features, k : int
        n, and features kept for one embedding.
    steps, batch : int
        Optimiser steps, and pairs a step.
    lr : float
        Peak rate of Adam; falls linearly to zero over the last `decay` of the steps.
    aux : float
        Weight of AuxK.
    aux_k : int
        Dead features that may explain the residual of one embedding.
    dead_after : int
        Steps without firing after which a feature counts as dead.
    floor : float
        Share of the even firing rate k / n under which a feature's bias is lifted.
    lift : float
        By how much a step, in mean activations.
    revive_at : tuple of float
        Shares of the steps at which dead features are pointed anew at what the others leave unexplained.
    group : float
        Weight of the group sparsity over a pair.
    align : float
        Weight of the contrastive term on activations.
    temperature : float
        Of the contrastive term, on cosines.
    align_batch : int
        Pairs of a batch that the contrastive term compares.
    mask : float
        Probability that a feature is hidden from both sides of a pair.
    modalities : tuple of str
        Whose reconstruction counts: both, or one for a half of `sae-pair`.
    seed : int
        Of initialisation and batches.
    """

    n_features: int = 2048
    k: int = 32
    steps: int = 300
    batch: int = 512
    lr: float = 1e-3
    decay: float = 0.4
    aux: float = 1 / 32
    aux_k: int = 64
    dead_after: int = 60
    floor: float = 0.1
    lift: float = 0.01
    revive_at: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65)
    group: float = 0.0
    align: float = 0.0
    temperature: float = 0.1
    align_batch: int = 256
    mask: float = 0.0
    modalities: tuple[str, ...] = ("image", "text")
    seed: int = 0


@dataclass(frozen=True)
class EmbeddingPairs:
    """Training pairs, texts drawn afresh in every batch.

    Attributes
    ----------
    images : Tensor
        Unit embeddings, float32 [n, d].
    caption : Tensor
        Row of `texts`, int64 [n].
    texts : Tensor
        Unit embeddings of the captions in several wordings, float32 [wordings, t, d].
    """

    images: Float[Tensor, "n d"]
    caption: Int[Tensor, " n"]
    texts: Float[Tensor, "wordings t d"]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pairs: images [size, d] and their captions [size, d], each in a wording drawn at random."""
        rows = torch.randint(len(self.images), (size,), generator=generator)
        wording = torch.randint(len(self.texts), (size,), generator=generator)
        return self.images[rows], self.texts[wording, self.caption[rows]]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return all images [n, d] and, beside each, the mean wording of its caption [n, d]."""
        return self.images, F.normalize(self.texts.mean(0), dim=-1)[self.caption]


@torch.no_grad()
def start_rows(
    pairs: EmbeddingPairs, settings: SAESettings, means: tuple[Tensor, Tensor]
) -> Float[Tensor, "n d"]:
    """Return the unit directions that features start from: centres of at most n clusters of what is trained on.

    What both sides of a pair have in common where a term of the loss ties them, else either side by itself, is averaged
    over the pairs of a caption; where there are fewer captions than features, single pairs are taken. Clusters are
    Ward's, which has no random start: dictionaries of different seeds start alike and then differ by their batches.
    With rows drawn from the data at random, half of a dictionary's features were others in the next seed's. That a
    dictionary is stable where its rows are tied to the data is the idea of archetypal ones (Fel et al., arXiv
    2502.12892).
    """
    sides = dict(zip((IMAGE, TEXT), pairs.sides(), strict=True))
    centred = [
        F.normalize(sides[modality] - mean, dim=-1)
        for modality, mean in zip((IMAGE, TEXT), means, strict=True)
        if modality.value in settings.modalities
    ]
    if settings.group > 0 or settings.align > 0:
        centred = [torch.stack(centred).sum(0)]
    captions, inverse = torch.unique(pairs.caption, return_inverse=True)
    if len(captions) * len(centred) > settings.n_features:
        centred = [torch.zeros(len(captions), x.shape[1]).index_add_(0, inverse, x) for x in centred]
    points = F.normalize(torch.cat(centred), dim=-1)
    some = np.sort(np.random.default_rng(0).permutation(len(points))[:CLUSTERED])
    points = points[torch.from_numpy(some)]
    if len(points) <= settings.n_features:
        return points
    clusters = fcluster(ward(points.numpy()), settings.n_features, "maxclust")
    number = torch.from_numpy(np.unique(clusters, return_inverse=True)[1])
    centres = torch.zeros(int(number.max()) + 1, points.shape[1]).index_add_(0, number, points)
    return F.normalize(centres, dim=-1)


def info_nce(a: Float[Tensor, "b n"], b: Float[Tensor, "b n"], temperature: float, same: Bool[Tensor, "b b"]):
    """Return the symmetric InfoNCE of two activations of the same pairs.

    Parameters
    ----------
    a, b : Tensor
        Non-negative activations.
    temperature : float
        On cosines.
    same : Tensor
        Pairs off the diagonal that share a caption and are no negatives.
    """
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def same_rows(x: Float[Tensor, "b d"]) -> Bool[Tensor, "b b"]:
    """Return which rows are (nearly) the same unit vector, without the diagonal."""
    same = x @ x.T > 0.999
    return same.fill_diagonal_(False)


class SAETrainer:
    """Fits one autoencoder.

    Parameters
    ----------
    pairs : EmbeddingPairs
        Training pairs.
    settings : SAESettings
        Hyperparameters.
    """

    def __init__(self, pairs: EmbeddingPairs, settings: SAESettings) -> None:
        self.pairs, self.settings = pairs, settings
        torch.manual_seed(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.sae = SAE(pairs.images.shape[1], settings.n_features, settings.k)
        self._initialise()
        trained = [self.sae.encoder, self.sae.encoder_bias, self.sae.decoder]
        self.optimiser = torch.optim.Adam(trained, lr=settings.lr, betas=(0.9, 0.99))
        self.idle = torch.zeros(settings.n_features, dtype=torch.int64)
        self.firing = torch.full((settings.n_features,), settings.k / settings.n_features)
        self.level = torch.zeros(())
        self.step = 0

    @torch.no_grad()
    def _initialise(self) -> None:
        """Centre each modality on its mean, and point the features at clusters of the training data."""
        sae, s = self.sae, self.settings
        images, texts = self.pairs.sides()
        sae.pre_bias_image.copy_(images.mean(0)).requires_grad_(False)
        sae.pre_bias_text.copy_(texts.mean(0)).requires_grad_(False)
        rows = start_rows(self.pairs, s, (sae.pre_bias_image, sae.pre_bias_text))
        noise = torch.randn(s.n_features, rows.shape[1], generator=self.generator) / rows.shape[1] ** 0.5
        noise[: len(rows)] *= START_NOISE
        # Where there are fewer directions than features, some start near the same one, each in a way of its own.
        noise[len(rows) :] *= REPEATED_NOISE
        rows = rows[torch.arange(s.n_features) % len(rows)]
        image, text = self.pairs.batch(512, self.generator)
        x = torch.cat([image - sae.pre_bias_image, text - sae.pre_bias_text])
        sae.decoder.copy_(F.normalize(rows + noise, dim=-1))
        sae.encoder.copy_(sae.decoder.T)
        # Rows drawn from data overlap, so that their sum overshoots many times: scale it to fit best.
        back = sae.activate(x @ sae.encoder) @ sae.decoder
        sae.encoder.mul_((x * back).sum() / (back**2).sum())

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step."""
        s = self.settings
        progress = self.step / s.steps
        return min(1.0, (self.step + 1) / (0.05 * s.steps), (1.0 - progress) / s.decay)

    def _aux_loss(self, x: Tensor, pre: Tensor, residual: Tensor) -> Tensor:
        """Return the share of the residual that dead features leave unexplained (AuxK)."""
        dead = (self.idle > self.settings.dead_after).nonzero().squeeze(1)
        if len(dead) == 0:
            return residual.new_zeros(())
        values, among = pre[:, dead].topk(min(self.settings.aux_k, len(dead)), dim=-1)
        values = select(self.sae.encoder, self.sae.encoder_bias, x, dead[among], values).relu()
        error = residual - combine(self.sae.decoder, values, dead[among])
        return (error**2).sum() / (residual**2).sum().clamp_min(1e-9)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the loss of one batch of pairs and note which features fired."""
        s, sae = self.settings, self.sae
        hidden = torch.rand(len(image), s.n_features, generator=self.generator) < s.mask if s.mask else None
        total = image.new_zeros(())
        activations = []
        fired = torch.zeros(s.n_features)
        for e, modality in ((image, IMAGE), (text, TEXT)):
            if modality.value not in s.modalities:
                continue
            x = e - sae.pre_bias(modality)
            with torch.no_grad():
                pre = torch.addmm(sae.encoder_bias, x, sae.encoder)
                shown = pre if hidden is None else pre.masked_fill(hidden, -1.0)
                values, indices = shown.topk(s.k, dim=-1, sorted=False)
            values = select(sae.encoder, sae.encoder_bias, x, indices, values).relu()
            residual = x - combine(sae.decoder, values, indices)
            total = total + (residual**2).sum() / (x**2).sum()
            if s.aux:
                total = total + s.aux * self._aux_loss(x, pre, residual.detach())
            active = values.detach() > 0
            fired += torch.bincount(indices[active], minlength=s.n_features)
            self.level = values.detach()[active].mean()
            if not s.group and not s.align:
                continue
            few = slice(s.align_batch)
            dense = torch.zeros(len(values[few]), s.n_features).scatter(-1, indices[few], values[few])
            activations.append(dense)
        self.idle = torch.where(fired > 0, 0, self.idle + 1)
        self.firing.lerp_(fired / (len(s.modalities) * len(image)), 0.03)
        if len(activations) == 2 and s.group:
            both = torch.sqrt(activations[0] ** 2 + activations[1] ** 2 + 1e-8) - 1e-4
            total = total + s.group * both.sum(1).mean() / (2 * s.k) ** 0.5
        if len(activations) == 2 and s.align:
            same = same_rows(text[: s.align_batch])
            total = total + s.align * info_nce(*activations, s.temperature, same)
        return total

    @torch.no_grad()
    def revive(self) -> None:
        """Point dead features at the embeddings that are reconstructed worst, each at another one."""
        sae, s = self.sae, self.settings
        dead = (self.idle > s.dead_after).nonzero().squeeze(1)
        sides = dict(zip((IMAGE, TEXT), self.pairs.batch(4 * s.batch, self.generator), strict=True))
        residuals = []
        for modality, e in sides.items():
            if modality.value in s.modalities:
                residuals.append(e - sae.reconstruct(e, modality))
        residual = torch.cat(residuals)
        dead = dead[: len(residual)]
        worst = torch.multinomial((residual**2).sum(1), max(1, len(dead)), generator=self.generator)[
            : len(dead)
        ]
        rows = F.normalize(residual[worst], dim=-1)
        live = self.idle <= s.dead_after
        sae.decoder[dead] = rows
        sae.encoder[:, dead] = rows.T * sae.encoder[:, live].norm(dim=0).mean()
        sae.encoder_bias[dead] = 0.0
        # The moments of a feature's former life would push its new one.
        columns = (slice(None), dead)
        moved = ((sae.decoder, dead), (sae.encoder, columns), (sae.encoder_bias, dead))
        for parameter, index in moved:
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][moment][index] = 0.0
        self.idle[dead] = 0

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        if self.step in {round(share * self.settings.steps) for share in self.settings.revive_at} - {0}:
            self.revive()
        loss = self.loss(*self.pairs.batch(self.settings.batch, self.generator))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        decoder = self.sae.decoder
        # Only the part across a unit row turns it; along it Adam would waste its scale.
        decoder.grad -= (decoder.grad * decoder.data).sum(1, keepdim=True) * decoder.data
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * self.rate()
        self.optimiser.step()
        self.sae.normalise_decoder()
        # A few features win every TopK where embeddings have few dimensions; a bias is enough to bring the rest back,
        # and unlike a loss it asks nothing of those that fire.
        rare = self.firing < self.settings.floor * self.settings.k / self.settings.n_features
        with torch.no_grad():
            self.sae.encoder_bias[rare] += self.settings.lift * self.level
        self.step += 1
        return float(loss.detach())

    def run(self, label: str = "", tell: Callable[[float], None] | None = None) -> SAE:
        """Train to the end; returns the autoencoder in eval mode.

        Progress is printed, or told step by step where `tell` is given.
        """
        started = time.monotonic()
        every = max(1, self.settings.steps // 4)
        while self.step < self.settings.steps:
            loss = self.train_step()
            if tell is not None:
                tell(1.0)
            elif self.step % every == 0:
                dead = int((self.idle > self.settings.dead_after).sum())
                seconds = time.monotonic() - started
                print(f"{label} step {self.step} loss {loss:.4f} dead {dead} {seconds:.0f} s", flush=True)
        self.wake()
        return self.sae.eval().requires_grad_(False)

    @torch.no_grad()
    def wake(self, least: int = 5, rounds: int = 3) -> None:
        """Raise the biases of features that never fire until each fires on about `least` training embeddings."""
        sae, s = self.sae, self.settings
        sides = dict(zip((IMAGE, TEXT), self.pairs.sides(), strict=True))
        for _ in range(rounds):
            fires = torch.zeros(s.n_features, dtype=torch.bool)
            margins = []
            for modality, e in sides.items():
                if modality.value not in s.modalities:
                    continue
                for chunk in e.split(4096):
                    pre = sae.pre_activations(chunk, modality)
                    bar = pre.topk(s.k, dim=-1).values[:, -1:].relu()
                    fires |= (sae.activate(pre) > 0).any(0)
                    margins.append((pre - bar).topk(min(least, len(chunk)), dim=0).values)
            dead = ~fires
            if not dead.any():
                return
            margin = torch.cat(margins)
            margin = margin.topk(min(least, len(margin)), dim=0).values[-1]
            sae.encoder_bias[dead] += 1e-3 * self.level - margin[dead]
