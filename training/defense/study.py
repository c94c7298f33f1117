"""What the defence study works with: its sizes, the attacks, and what the towers see of attacked pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from services.bundle.load import Bundle
from services.defense import DefenseCalibration
from services.modality.tables import Label
from training.defense import corruptions
from training.defense.attacks import Loss, apgd, feature_matching, pgd, untargeted
from training.defense.calibrate import Seen, Setting, calibrate
from training.defense.corruptions import typographic
from training.defense.data import Drawings, StudyData
from training.defense.observe import Looks, Observed, join, look_twice, observed_from
from training.defense.victim import Victim, to_images, to_pixels

EPSILONS = (1, 4, 8)
GRADIENT_ATTACKS = ("pgd", "apgd", "match")
# Which attack teaches r3, and which choose the filter.
LEARNT_ON: list[Setting] = [("pgd", epsilon) for epsilon in EPSILONS]
CHOSEN_ON: list[Setting] = [("pgd", 1), ("pgd", 4), ("match", 4)]


@dataclass(frozen=True)
class StudySettings:
    """Sizes of the study.

    Attributes
    ----------
    images : int
        Attacked drawings of the evaluation half; half as many of the calibration half.
    steps : int
        Gradients an image of the fixed attacks; the adaptive attack takes twice as many.
    adaptive_images : int
        Drawings of the adaptive attack.
    clean_images : int
        Clean drawings of the evaluation half, each under every harmless change.
    false_positive_rate : float
        The operating point that filters are chosen and accuracies are given at.
    seed : int
        Of the halves, the starts and the targets.
    """

    images: int = 64
    steps: int = 10
    adaptive_images: int = 32
    clean_images: int = 200
    false_positive_rate: float = 0.01
    seed: int = 0


class Attacker:
    """Makes the attacked pictures, as the 8 bits a channel that can be sent.

    Parameters
    ----------
    victim : Victim
        The tower.
    data : StudyData
        Labels.
    steps : int
        Gradients an image.
    cache : Path or None
        Folder where attacked pictures are kept, so that a study that was interrupted goes on where it was. It must be
        of these towers alone.
    """

    def __init__(self, victim: Victim, data: StudyData, steps: int, cache: Path | None = None) -> None:
        self.victim = victim
        self.data = data
        self.steps = steps
        self.cache = cache

    def targets(self, drawings: Drawings) -> np.ndarray:
        """Return a label for each drawing that is not the true one."""
        count = len(self.data.labels)
        moved = np.random.default_rng(len(drawings.truth)).integers(1, count, len(drawings.truth))
        return (drawings.truth + moved) % count

    def attack(self, name: str, epsilon: int, drawings: Drawings) -> torch.Tensor:
        """Return the attacked pictures."""
        if name == "typographic":
            return typographic(
                drawings.images, [self.data.labels[target] for target in self.targets(drawings)]
            )
        if self.cache is None:
            return self._attack(name, epsilon, drawings)
        digest = hashlib.sha256(to_pixels(drawings.images).tobytes() + drawings.truth.tobytes())
        # The towers and the labels say what the texts' embeddings are.
        digest.update("\n".join(self.data.labels).encode())
        file = self.cache / f"{name}-{epsilon}-{self.steps}-{digest.hexdigest()[:16]}.npy"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = to_pixels(self._attack(name, epsilon, drawings))
            part = file.with_suffix(".part")
            with part.open("wb") as open_file:
                np.save(open_file, pixels)
            part.replace(file)
        return to_images(np.load(file))

    def _attack(self, name: str, epsilon: int, drawings: Drawings) -> torch.Tensor:
        run = apgd if name == "apgd" else pgd
        targets = self.targets(drawings)
        parts = []
        for start in range(0, len(drawings.truth), 32):
            some = slice(start, start + 32)
            loss = self._loss(name, drawings.truth[some], targets[some])
            generator = torch.Generator().manual_seed(start + epsilon)
            parts.append(
                run(loss, drawings.images[some], epsilon / 255, steps=self.steps, generator=generator)
            )
        return to_images(to_pixels(torch.cat(parts)))

    def _loss(self, name: str, truth: np.ndarray, targets: np.ndarray) -> Loss:
        if name == "match":
            return feature_matching(self.victim, self.data.texts[targets])
        return untargeted(self.victim, self.data.texts, torch.from_numpy(truth), self.victim.logit_scale)


def cached_looks(victim: Victim, images: torch.Tensor, cache: Path | None) -> Looks:
    """Look at pictures twice, or read what an earlier run saw of them."""
    if cache is None:
        return look_twice(victim, images)
    digest = hashlib.sha256(to_pixels(images).tobytes()).hexdigest()[:16]
    file = cache / f"looks-{digest}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        with part.open("wb") as open_file:
            np.savez(open_file, **vars(look_twice(victim, images)))
        part.replace(file)
    with np.load(file) as arrays:
        # By their order: files of earlier runs have another name for `smoothed`.
        return Looks(*(arrays[name] for name in arrays.files))


class Study:
    """One run of the study.

    Parameters
    ----------
    bundle : Bundle
        Under study.
    data : StudyData
        Drawings and labels.
    settings : StudySettings
        Sizes.
    dictionary : str
        Its name; empty for the default one.
    cache : Path or None
        Where attacked pictures, and what the towers saw, are kept between runs.
    tell : callable
        Told a line now and then.
    """

    def __init__(
        self,
        bundle: Bundle,
        data: StudyData,
        settings: StudySettings,
        dictionary: str = "",
        cache: Path | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.tell = tell
        self.bundle, self.data, self.settings = bundle, data, settings
        self.victim = Victim(bundle)
        self.dictionary = bundle.dictionary(dictionary)
        self.text = bundle.modality(dictionary).label == Label.TEXT
        self.cache = None if cache is None else cache / bundle.manifest.clip.fingerprint[:16]
        self.attacker = Attacker(self.victim, data, settings.steps, self.cache)
        self.started = time.monotonic()

    def say(self, what: str) -> None:
        """Tell how far the study is."""
        self.tell(f"[{time.monotonic() - self.started:5.0f} s] {what}")

    def observe(self, images: torch.Tensor) -> Observed:
        """Look at pictures twice."""
        return observed_from(cached_looks(self.victim, images, self.cache), self.dictionary)

    def seen(self) -> Seen:
        """Attack the calibration half."""
        data = self.data
        drawings = data.calibration.first(self.settings.images // 2)
        clean = [self.observe(change(data.calibration_clean)) for change in calibration_changes()]
        self.say(f"calibration: {sum(map(len, clean))} clean pictures")
        attacked = {}
        for name in GRADIENT_ATTACKS:
            for epsilon in EPSILONS:
                attacked[name, epsilon] = self.observe(self.attacker.attack(name, epsilon, drawings))
            self.say(f"calibration: {name}")
        return Seen(join(clean), self.observe(drawings.images), attacked)

    def calibrate(self, seen: Seen) -> DefenseCalibration:
        """Make the calibration that ships."""
        return calibrate(
            seen,
            self.data,
            self.dictionary,
            self.text,
            self.bundle.manifest.clip.fingerprint,
            learnt_on=LEARNT_ON,
            chosen_on=CHOSEN_ON,
            false_positive_rate=self.settings.false_positive_rate,
        )

    def attacked(self, drawings: Drawings) -> dict[Setting, torch.Tensor]:
        """Attack drawings in every way that does not know the defence."""
        pictures: dict[Setting, torch.Tensor] = {}
        for name in GRADIENT_ATTACKS:
            for epsilon in EPSILONS:
                pictures[name, epsilon] = self.attacker.attack(name, epsilon, drawings)
            self.say(f"evaluation: {name}")
        pictures["typographic", 0] = self.attacker.attack("typographic", 0, drawings)
        return pictures


def calibration_changes():
    """Return the changes that clean calibration pictures come in: as drawn, and as a JPEG of good quality."""
    return (corruptions.HARMLESS["as drawn"], corruptions.HARMLESS["jpeg 90"])
