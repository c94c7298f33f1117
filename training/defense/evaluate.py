"""The study's figures, one function a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from services.bundle.towers import load_towers
from services.defense import DefenseCalibration
from services.defense.features import moved_features
from services.defense.scores import TWO_LOOKS
from training.defense import baselines as others
from training.defense.adaptive import Defended, adaptive, evasion
from training.defense.calibrate import Seen, Setting, answered, attack_pairs, detectors_from
from training.defense.corruptions import HARMLESS, jpeg
from training.defense.data import Drawings
from training.defense.measure import auroc, correct, mean
from training.defense.observe import Decoder, Observed, embed_with, join, observe, scores
from training.defense.victim import to_images, to_pixels

if TYPE_CHECKING:
    from training.defense.study import Study

LOOK_NAMES = {False: "one look", True: "two looks"}
# Baselines that cost many forwards are compared on these.
COMPARED: tuple[Setting, ...] = (("pgd", 1), ("pgd", 4), ("apgd", 4), ("match", 4))
ADAPTIVE_EPSILONS = (4, 8)
ADAPTIVE_WEIGHTS = (1.0, 10.0)


@dataclass(frozen=True)
class Context:
    """What all tables are made from.

    Attributes
    ----------
    study : Study
        Towers, data and sizes.
    calibration : DefenseCalibration
        As it ships.
    seen : Seen
        What it was made from.
    drawings : Drawings
        Of the evaluation half.
    pictures : mapping of (attack, epsilon) to float32 tensor
        The drawings attacked.
    """

    study: Study
    calibration: DefenseCalibration
    seen: Seen
    drawings: Drawings
    pictures: dict[Setting, torch.Tensor]

    @cached_property
    def decoder(self) -> Decoder:
        """Of the dictionary."""
        return Decoder.of(self.study.dictionary)

    @cached_property
    def harmless(self) -> dict[str, Observed]:
        """Clean pictures of the evaluation half, after each harmless change."""
        images = self.study.data.evaluation_clean[: self.study.settings.clean_images]
        return {name: self.study.observe(change(images)) for name, change in HARMLESS.items()}

    @cached_property
    def clean(self) -> Observed:
        """Clean pictures in the mixture that the calibration has: as drawn and as JPEG."""
        return join([self.harmless["as drawn"], self.harmless["jpeg 90"]])

    @cached_property
    def base(self) -> Observed:
        """The drawings before they are attacked."""
        return self.study.observe(self.drawings.images)

    @cached_property
    def attacked(self) -> dict[Setting, Observed]:
        """The drawings after."""
        return {setting: self.study.observe(images) for setting, images in self.pictures.items()}

    def accuracy(self, unit: np.ndarray, drawings: Drawings | None = None) -> dict[str, float]:
        """Return the share of embeddings whose nearest label is the true one."""
        chosen = drawings or self.drawings
        return mean(correct(unit, self.study.data.texts.numpy(), chosen.truth), chosen.truth)

    def answers(
        self, observed: Observed, second_look: bool, **options: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return verdicts, answered embeddings and numbers of changed features at the operating point."""
        rate = self.study.settings.false_positive_rate
        return answered(
            observed,
            self.calibration,
            self.decoder,
            second_look=second_look,
            false_positive_rate=rate,
            **options,
        )


def name_of(setting: Setting) -> str:
    """Return "pgd 4/255" and the like."""
    return f"{setting[0]} {setting[1]}/255" if setting[1] else setting[0]


def _logits(
    calibration: DefenseCalibration, decoder: Decoder, observed: Observed, second_look: bool
) -> np.ndarray:
    found = scores(observed, calibration.statistics, decoder, second_look)
    return calibration.detectors[second_look].logit(found)


def _rates(calibration: DefenseCalibration, logits: np.ndarray, second_look: bool) -> dict[str, Any]:
    detector = calibration.detectors[second_look]
    return {f"{rate:.0%}": mean(logits >= detector.threshold(rate)) for rate in (0.01, 0.05)}


def left_out(context: Context, setting: Setting) -> DefenseCalibration:
    """Return a calibration that has seen neither the attack nor the epsilon of `setting`."""
    rest = [s for s in context.seen.attacked if s[0] != setting[0] and s[1] != setting[1]]
    # One attack teaches r3, as in the calibration that ships.
    teacher = max(name for name, _ in rest)
    moved = moved_features(*attack_pairs(context.seen, [s for s in rest if s[0] == teacher]))
    statistics = replace(context.calibration.statistics, moved=moved)
    detectors = detectors_from(context.seen, rest, statistics, context.decoder)
    return replace(context.calibration, statistics=statistics, detectors=detectors)


def detection(context: Context) -> dict[str, Any]:
    """AUROC and true positive rates; each attack by a detector that saw neither it nor its epsilon."""
    table: dict[str, Any] = {}
    for setting, observed in context.attacked.items():
        calibration = left_out(context, setting)
        table[name_of(setting)] = {
            LOOK_NAMES[twice]: _detection(calibration, context.decoder, context.clean, observed, twice)
            for twice in (False, True)
        }
    return table


def _detection(
    calibration: DefenseCalibration, decoder: Decoder, clean: Observed, attacked: Observed, twice: bool
) -> dict[str, Any]:
    quiet = _logits(calibration, decoder, clean, twice)
    loud = _logits(calibration, decoder, attacked, twice)
    return {"auroc": auroc(quiet, loud), "detected": _rates(calibration, loud, twice)}


def single_scores(context: Context) -> dict[str, Any]:
    """AUROC of each score alone, with the r3 of the calibration that ships: what each of them adds."""
    statistics, decoder = context.calibration.statistics, context.decoder
    clean = scores(context.clean, statistics, decoder, True)
    table: dict[str, Any] = {}
    for setting, observed in context.attacked.items():
        found = scores(observed, statistics, decoder, True)
        table[name_of(setting)] = {name: auroc(clean[:, k], found[:, k]) for k, name in enumerate(TWO_LOOKS)}
    return table


def false_positives(context: Context) -> dict[str, Any]:
    """Share of clean pictures called adversarial, by harmless change and operating point."""
    return {
        name: {
            LOOK_NAMES[twice]: _rates(
                context.calibration, _logits(context.calibration, context.decoder, observed, twice), twice
            )
            for twice in (False, True)
        }
        for name, observed in {**context.harmless, **served(context)}.items()
    }


def served(context: Context) -> dict[str, Observed]:
    """Look at clean pictures through the towers as this machine serves them, in whose precision embeddings differ."""
    study = context.study
    towers = load_towers(study.bundle, threads=1)
    try:
        images = study.data.evaluation_clean[: study.settings.clean_images]
        name = f"as drawn, {towers.backend} {towers.precision}"
        return {name: observe(embed_with(towers, study.victim), study.dictionary, images)}
    finally:
        towers.close()


def robustness(context: Context) -> dict[str, Any]:
    """Accuracy without a defence and with it, and the share of pictures that are flagged or still right."""
    table: dict[str, Any] = {}
    concepts = context.drawings.truth
    for name, observed in {
        "clean": context.base,
        **{name_of(s): o for s, o in context.attacked.items()},
    }.items():
        row: dict[str, Any] = {"undefended": context.accuracy(observed.unit)}
        for twice in (False, True):
            flagged, unit, _ = context.answers(observed, twice)
            right = correct(unit, context.study.data.texts.numpy(), context.drawings.truth)
            _, filtered, _ = context.answers(observed, twice, filter_all=True)
            row[LOOK_NAMES[twice]] = {
                "accuracy": mean(right, concepts),
                "filter_all": context.accuracy(filtered),
                "flagged": mean(flagged, concepts),
                "flagged_or_right": mean(flagged | right, concepts),
            }
        table[name] = row
    return table


def targeted(context: Context) -> dict[str, Any]:
    """Share of targeted attacks whose picture is taken for the target, before and after filtering."""
    texts = context.study.data.texts.numpy()
    targets, concepts = context.study.attacker.targets(context.drawings), context.drawings.truth
    table: dict[str, Any] = {}
    for setting, observed in context.attacked.items():
        if setting[0] not in ("match", "typographic"):
            continue
        row: dict[str, Any] = {
            "before": mean(correct(observed.unit, texts, targets), concepts),
            "clean": mean(correct(context.base.unit, texts, targets), concepts),
        }
        for twice in (False, True):
            flagged, unit, _ = context.answers(observed, twice)
            hit = correct(unit, texts, targets)
            row[LOOK_NAMES[twice]] = {
                "after": mean(hit, concepts),
                "unflagged": mean(hit & ~flagged, concepts),
            }
        table[name_of(setting)] = row
    return table


def baselines(context: Context) -> dict[str, Any]:
    """Accuracy of other defences on the same pictures, every one applied to every picture."""
    study = context.study
    victim, rng = study.victim, np.random.default_rng(study.settings.seed)
    images = {"clean": context.drawings.images} | {name_of(s): context.pictures[s] for s in COMPARED}
    observed = {"clean": context.base} | {name_of(s): context.attacked[s] for s in COMPARED}
    _, _, changed = context.answers(context.attacked[COMPARED[1]], True, filter_all=True)
    kept = _pca_size(context)
    directions = others.principal_directions(study.data.clean_units, kept)
    defenses: dict[str, Callable[[str], np.ndarray]] = {
        "no-op": lambda name: observed[name].unit,
        "random features": lambda name: others.random_features(
            observed[name].unit, observed[name].z, changed, context.decoder, rng
        ),
        f"PCA {kept}": lambda name: others.pca(observed[name].unit, *directions),
        "JPEG 75": lambda name: victim.embed(jpeg(images[name], 75)).numpy(),
        "JPEG 25": lambda name: victim.embed(jpeg(images[name], 25)).numpy(),
        "noise averaging": lambda name: others.noise_averaging(victim, images[name], 16 / 255, 4),
        "counterattack": lambda name: others.counterattack(victim, images[name]),
        "smoothed picture": lambda name: observed[name].smoothed,
        "filter, one look": lambda name: context.answers(observed[name], False)[1],
        "filter, two looks": lambda name: context.answers(observed[name], True)[1],
        "filter all, two looks": lambda name: context.answers(observed[name], True, filter_all=True)[1],
    }
    return {
        defense: {name: context.accuracy(embed(name)) for name in images}
        for defense, embed in defenses.items()
    }


def _pca_size(context: Context) -> int:
    """Return the fewest directions that cost clean calibration drawings at most two points of accuracy."""
    study = context.study
    base, texts = context.seen.base, study.data.texts.numpy()
    truth = study.data.calibration.truth[: len(base)]
    full = correct(base.unit, texts, truth).mean()
    for kept in (4, 8, 12, 16, 24, 32, 64, 128):
        directions = others.principal_directions(study.data.clean_units, kept)
        if correct(others.pca(base.unit, *directions), texts, truth).mean() >= full - 0.02:
            return kept
    return base.unit.shape[1]


def adaptive_metrics(context: Context) -> dict[str, Any]:
    """Attack with knowledge of the defence: what is left, by the worse of two weights for each picture."""
    study = context.study
    drawings = context.drawings.first(study.settings.adaptive_images)
    return {
        LOOK_NAMES[twice]: {
            f"{epsilon}/255": _adaptive(context, drawings, epsilon, twice) for epsilon in ADAPTIVE_EPSILONS
        }
        for twice in (False, True)
    }


def _adaptive(context: Context, drawings: Drawings, epsilon: int, twice: bool) -> dict[str, Any]:
    study = context.study
    defended = Defended(
        study.victim, study.dictionary, context.calibration, twice, study.settings.false_positive_rate
    )
    truth = torch.from_numpy(drawings.truth)
    flagged, right, logits = [], [], []
    for weight in ADAPTIVE_WEIGHTS:
        loss = evasion(defended, study.data.texts, truth, weight)
        generator = torch.Generator().manual_seed(study.settings.seed)
        moved = adaptive(
            loss, drawings.images, epsilon / 255, steps=2 * study.settings.steps, generator=generator
        )
        observed = study.observe(to_images(to_pixels(moved)))
        verdicts, unit, _ = context.answers(observed, twice)
        flagged.append(verdicts)
        right.append(correct(unit, study.data.texts.numpy(), drawings.truth))
        logits.append(_logits(context.calibration, context.decoder, observed, twice))
    # For each picture the attacker keeps what is wrong and unflagged, else what is wrong, else the least suspicious.
    merit = [2.0 * ~r + ~f for f, r in zip(flagged, right, strict=True)]
    best = np.argmax(merit, axis=0)
    pick = np.arange(len(best))
    verdict, good, logit = (np.stack(values)[best, pick] for values in (flagged, right, logits))
    clean = _logits(context.calibration, context.decoder, context.clean, twice)
    concepts = drawings.truth
    return {
        "undefended": mean(
            correct(context.base.unit[: len(good)], study.data.texts.numpy(), drawings.truth), concepts
        ),
        "accuracy": mean(good, concepts),
        "flagged": mean(verdict, concepts),
        "evades": mean(~verdict & ~good, concepts),
        "auroc": auroc(clean, logit),
    }


def test_artist(context: Context) -> dict[str, Any]:
    """The same on an artist whom nothing here was made from: to be read, never to be chosen by."""
    study = context.study
    drawings = study.data.test
    clean = study.observe(drawings.images)
    attacked = study.observe(study.attacker.attack("pgd", 4, drawings))
    table: dict[str, Any] = {}
    for twice in (False, True):
        flagged, unit, _ = context.answers(attacked, twice)
        _, clean_unit, _ = context.answers(clean, twice)
        quiet = _logits(context.calibration, context.decoder, clean, twice)
        loud = _logits(context.calibration, context.decoder, attacked, twice)
        table[LOOK_NAMES[twice]] = {
            "auroc": auroc(quiet, loud),
            "detected": _rates(context.calibration, loud, twice),
            "false_positives": _rates(context.calibration, quiet, twice),
            "accuracy": context.accuracy(unit, drawings),
            "clean_accuracy": context.accuracy(clean_unit, drawings),
        }
    table["images"] = len(drawings.truth)
    table["undefended"] = context.accuracy(attacked.unit, drawings)
    table["undefended_clean"] = context.accuracy(clean.unit, drawings)
    return table
