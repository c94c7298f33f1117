"""The hyperparameters of the towers' training, and the schedules they make."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TowerSettings:
    """Hyperparameters of a run; the defaults are the recipe of the embedded bundle.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps of the image tower with word sums as captions, and drawings a step.
    image_lr, word_lr : float
        Peak learning rates of AdamW for the image tower, and for word vectors and the projector.
    muon_lr : float
        Peak learning rate of Muon, which moves the matrices and filters of the trunk.
    weight_decay : float
        On matrices and filters only.
    warm_up, decay : float
        Shares of the steps with a rising and a falling rate.
    low_resolution : int
        Pixels a side during the first `low_share` of the steps.
    weak, strong, strong_from : float
        Strength of the augmentation at the start and in the end, and the share of the steps after which it is
        strong.
    toned_light : float
        How much of the change of light a drawing keeps whose caption tells a skin tone.
    text_weight : float
        Of the loss from caption to image, against the loss from image to caption.
    concept_weight, temperature : float
        Of the supervised contrastive loss, whose positives are drawings of one concept, and of its softmax.
    gender_weight, gender_from : float
        Of the loss that tells "woman" from "man", and the share of the steps after which it joins.
    emoji_share : float
        Share of a batch that comes from the training artists; the rest is line art.
    average : float
        Decay, per step, of the moving average of the weights.
    text_steps, text_batch : int
        Optimiser steps of the text tower, and texts a step.
    text_lr : float
        Peak learning rate of the text tower.
    tune_steps : int
        Optimiser steps of the image tower after the text tower is trained.
    tune_rate : float
        Peak of those steps as a share of the peak rates above; it falls to zero over all of them.
    tune_weak : float
        Strength of the augmentation at the end of those steps: what is measured are drawings as they were drawn.
    without : str
        Artists to leave out, separated by commas; the log has retrieval on them.
    seed : int
        Of weights, samples and augmentation.
    """

    steps: int = 5500
    batch: int = 256
    image_lr: float = 2e-3
    word_lr: float = 2e-3
    muon_lr: float = 4e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    decay: float = 0.4
    low_resolution: int = 40
    low_share: float = 0.6
    weak: float = 0.3
    strong: float = 0.7
    strong_from: float = 0.5
    toned_light: float = 0.3
    text_weight: float = 0.3
    concept_weight: float = 0.3
    temperature: float = 0.1
    gender_weight: float = 0.5
    gender_from: float = 0.6
    emoji_share: float = 0.75
    average: float = 0.99
    text_steps: int = 500
    text_batch: int = 256
    text_lr: float = 1e-3
    tune_steps: int = 500
    tune_rate: float = 0.4
    tune_weak: float = 0.5
    without: str = ""
    seed: int = 0

    def artists_left_out(self) -> list[str]:
        """Return the names in `without`."""
        return self.without.split(",") if self.without else []

    def images(self, size: int) -> Phase:
        """Return the schedule of the image tower with word sums as captions, for towers of `size` pixels a side."""
        return Phase(
            name="images",
            steps=self.steps,
            peak=1.0,
            warm_up=self.warm_up,
            decay=self.decay,
            resolutions=((self.low_share, self.low_resolution), (1.0, size)),
            strengths=((0.0, self.weak), (self.strong_from, self.strong)),
            gender_from=self.gender_from,
        )

    def locked(self, size: int) -> Phase:
        """Return the schedule of the image tower with the text tower's own captions, which stay as they are."""
        return Phase(
            name="locked",
            steps=self.tune_steps,
            peak=self.tune_rate,
            warm_up=self.warm_up,
            decay=1.0,
            resolutions=((1.0, size),),
            strengths=((0.0, self.strong), (0.7, self.strong), (1.0, self.tune_weak)),
            gender_from=0.0,
        )


@dataclass(frozen=True)
class Phase:
    """A schedule over the progress of a phase, from 0 to 1.

    Parameters
    ----------
    name : str
        In the log and in checkpoints.
    steps : int
        Optimiser steps.
    peak : float
        Factor of every peak learning rate.
    warm_up, decay : float
        Shares of the steps with a rising and a falling rate.
    resolutions : tuple[tuple[float, int], ...]
        Until which progress drawings have how many pixels a side; the last until 1.
    strengths : tuple[tuple[float, float], ...]
        Strength of the augmentation at some progress, with straight lines between.
    gender_from : float
        Progress from which the gender loss counts.
    """

    name: str
    steps: int
    peak: float
    warm_up: float
    decay: float
    resolutions: tuple[tuple[float, int], ...]
    strengths: tuple[tuple[float, float], ...]
    gender_from: float

    def rate(self, progress: float) -> float:
        """Return the factor of the peak learning rates."""
        return self.peak * min(1.0, (progress + 1e-3) / self.warm_up, (1.0 - progress) / self.decay)

    def resolution(self, progress: float) -> int:
        """Return the pixels a side."""
        return next((pixels for end, pixels in self.resolutions if progress < end), self.resolutions[-1][1])

    def strength(self, progress: float) -> float:
        """Return the strength of the augmentation."""
        return float(np.interp(progress, *zip(*self.strengths, strict=True)))
