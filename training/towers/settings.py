"""The hyperparameters of the towers' training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipSettings:
    """Hyperparameters of a run.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps of the image tower, and pairs a step.
    image_lr, word_lr : float
        Peak learning rates of the image tower and of the word vectors.
    weight_decay : float
        On matrices and filters only.
    warm_up, decay : float
        Shares of the steps with a rising and a falling rate.
    low_resolution : int
        Pixels a side during the first `low_share` of the steps.
    weak, strong, strong_from : float
        Strength of the augmentation at the start and in the end, and the share of the steps after which it is
        strong.
    text_weight : float
        Of the loss from caption to image, against the loss from image to caption.
    gender_weight, gender_from : float
        Of the loss that tells "woman" from "man", and the share of the steps after which it joins.
    emoji_share : float
        Share of a batch that comes from the training artists; the rest is line art.
    text_steps, text_batch : int
        Optimiser steps of the text tower, and texts a step.
    text_lr : float
        Peak learning rate of the text tower.
    tune_steps : int
        Optimiser steps of the image tower after the text tower is trained.
    tune_lr : float
        Peak learning rate of those steps; it falls to zero over all of them.
    without : str
        A set to leave out (leave-one-artist-out runs), or empty.
    seed : int
        Of weights, samples and augmentation.
    """

    steps: int = 3200
    batch: int = 128
    image_lr: float = 2e-3
    word_lr: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    decay: float = 0.4
    low_resolution: int = 32
    low_share: float = 0.8
    weak: float = 0.3
    strong: float = 0.7
    strong_from: float = 0.5
    text_weight: float = 0.3
    gender_weight: float = 0.5
    gender_from: float = 0.6
    emoji_share: float = 0.75
    text_steps: int = 400
    text_batch: int = 256
    text_lr: float = 1e-3
    tune_steps: int = 2000
    tune_lr: float = 1e-3
    without: str = ""
    seed: int = 0
