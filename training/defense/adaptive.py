"""The attacker who knows the defence: its detector and its filter are part of what is differentiated.

TopK lets no gradient through to features that are not chosen, which would stall an attack without making the defence
any stronger. The attack therefore sees straight through it: forward TopK(ReLU(pre)), backward ReLU(pre). Which
features are suspicious, and the verdict, are taken as they are at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from services.defense.calibration import DefenseCalibration
from services.defense.features import RARE
from services.defense.filtering import FilterMode
from services.defense.smoothing import checkerboard, noise, smooth
from services.dictionaries import SAE, Dictionary, Modality, SAEPair
from training.defense.attacks import Loss, ascend, project, random_start
from training.defense.victim import Victim


def straight_through(dictionary: Dictionary, e: Float[Tensor, "B d"]) -> Float[Tensor, "B n"]:
    """Return the activations of image embeddings, with the gradient of ReLU(pre) for a TopK dictionary."""
    sae = dictionary.image if isinstance(dictionary, SAEPair) else dictionary
    if not isinstance(sae, SAE):
        return dictionary.encode(e, Modality.IMAGE)
    pre = sae.pre_activations(e, Modality.IMAGE)
    smooth_part = pre.relu()
    return sae.activate(pre).detach() + smooth_part - smooth_part.detach()


@dataclass(frozen=True)
class Defended:
    """The tower with its defence, in torch and differentiable; `services.defense.screen` is what it stands for.

    Attributes
    ----------
    victim, dictionary, calibration
        What is attacked.
    second_look : bool
        Whether pictures are looked at twice.
    false_positive_rate : float
        The operating point.
    """

    victim: Victim
    dictionary: Dictionary
    calibration: DefenseCalibration
    second_look: bool
    false_positive_rate: float

    def scores(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B k"], Float[Tensor, "B d"], Float[Tensor, "B d"]]:
        """Return the detection scores, the embeddings and the filtered embeddings."""
        statistics, modality = self.calibration.statistics, Modality.IMAGE
        e = self.victim(images)
        z = straight_through(self.dictionary, e)
        energy = z.square() / z.square().sum(1, keepdim=True).clamp_min(1e-12)
        columns = [
            (e - self.dictionary.decode(z, modality)).norm(dim=1),
            (energy * torch.from_numpy(statistics.text)).sum(1),
            (energy * torch.from_numpy(statistics.moved)).sum(1),
            noise(images),
        ]
        other, other_e = z, e
        if self.second_look:
            other_e = self.victim(smooth(images))
            other = straight_through(self.dictionary, other_e)
            columns.append(1 - (e * other_e).sum(1))
        return torch.stack(columns, 1), e, self.filtered(e, z, other_e, other)

    def filtered(
        self,
        e: Float[Tensor, "B d"],
        z: Float[Tensor, "B n"],
        other_e: Float[Tensor, "B d"],
        other: Float[Tensor, "B n"],
    ) -> Float[Tensor, "B d"]:
        """Return the filtered embeddings; `other_e` and `other` are of the smoothed pictures."""
        choice, modality = self.calibration.choices[self.second_look], Modality.IMAGE
        restores = choice.mode is FilterMode.RESTORE
        kept = torch.where(self.changed(z, other), other if restores else 0.0, z)
        rebuilt = self.dictionary.decode(kept, modality)
        if choice.keep_residual:
            base_e, base = (other_e, other) if restores else (e, z)
            rebuilt = base_e + rebuilt - self.dictionary.decode(base, modality)
        return F.normalize(rebuilt, dim=1)

    @torch.no_grad()
    def changed(self, z: Float[Tensor, "B n"], other: Float[Tensor, "B n"]) -> Bool[Tensor, "B n"]:
        """Return the features that the filter touches."""
        statistics = self.calibration.statistics
        mode = self.calibration.choices[self.second_look].mode
        unstable = (z - other).abs() > statistics.tolerance
        if mode is FilterMode.RESTORE:
            return unstable
        if mode is FilterMode.DROP:
            return unstable | torch.from_numpy(statistics.moved | statistics.text)
        return (z > torch.from_numpy(statistics.upper).clamp_min(0)) | torch.from_numpy(
            statistics.firing_rate < RARE
        )

    def logit(self, scores: Float[Tensor, "B k"]) -> Float[Tensor, " B"]:
        """Return the detector's logit."""
        detector = self.calibration.detectors[self.second_look]
        floor, mean, scale, weight = (
            torch.from_numpy(part).float()
            for part in (detector.floor, detector.mean, detector.scale, detector.weight)
        )
        return ((scores.clamp_min(0) + floor).log() - mean) / scale @ weight + detector.bias

    @property
    def threshold(self) -> float:
        """Logit from which on a picture is called adversarial."""
        return self.calibration.detectors[self.second_look].threshold(self.false_positive_rate)


def loud(images: Float[Tensor, "B 3 H W"], quiet: float = 0.3) -> Float[Tensor, "B 1 H W"]:
    """Return 1 where an attack may act without raising r4, and 0 on the quietest share of each picture.

    r4 is what the quietest quarter of the windows shows; who leaves somewhat more than a quarter alone is not seen
    by it.
    """
    pattern = checkerboard(images)[:, None]
    # What surrounds a window, and then its place, break the ties of flat ground, so that what is left alone is one
    # piece.
    place = torch.linspace(0, 1e-4, pattern[0].numel()).view_as(pattern[0])
    calm = pattern + 1e-2 * F.avg_pool2d(pattern, 9, stride=1, padding=4) + place
    limit = calm.flatten(1).quantile(quiet, dim=1).view(-1, 1, 1, 1)
    untouched = F.pad((calm <= limit).float(), (1, 1, 1, 1))
    # A pixel is in up to four windows, and must be in no quiet one.
    return 1 - F.max_pool2d(untouched, 2, stride=1)


def evasion(
    defended: Defended,
    texts: Float[Tensor, "L d"],
    truth: Int[Tensor, " B"],
    weight: float,
    margin: float = 1.0,
) -> Loss:
    """Return cross-entropy of what the service answers - weight x max(logit - threshold + margin, 0)."""
    scale = defended.victim.logit_scale

    def loss(images: Tensor) -> Tensor:
        scores, e, filtered = defended.scores(images)
        logit = defended.logit(scores)
        flagged = (logit >= defended.threshold).detach()
        answered = torch.where(flagged[:, None], filtered, e)
        wrong = F.cross_entropy(scale * answered @ texts.T, truth, reduction="none")
        return wrong - weight * (logit - defended.threshold + margin).relu()

    return loss


def adaptive(
    loss: Loss,
    images: Float[Tensor, "B 3 H W"],
    epsilon: float,
    *,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "B 3 H W"]:
    """PGD on `loss` where `loud` allows it; returns the best images seen, as 8-bit pictures would hold them."""
    allowed = loud(images)
    at = images + allowed * (random_start(images, epsilon, generator) - images)
    best, best_value = images.clone(), torch.full((len(images),), -torch.inf)
    step = 2.5 * epsilon / steps
    for _ in range(steps):
        value, gradient = ascend(loss, at)
        better = value > best_value
        best[better], best_value = at.detach()[better], torch.where(better, value, best_value)
        at = project(at + step * allowed * gradient.sign(), images, epsilon)
    value, _ = ascend(loss, at)
    best[value > best_value] = at.detach()[value > best_value]
    return best
