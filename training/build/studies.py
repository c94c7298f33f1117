"""Calibrate gender bias and the defence on one's own pairs, with the studies of the embedded bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.bias.audit import AuditSettings
from services.bias.calibration import BiasCalibration
from services.bias.cases import MIN_CLUSTERS
from services.bias.gender import gender_direction
from services.bundle.load import BIAS, DEFENSE, Bundle
from services.defense import DefenseCalibration
from services.encoding.images import ImagePreprocess, decode_image
from services.errors import ImageError, NotEnoughItems
from training.bias.data import GENDER
from training.bias.data import StudyData as BiasData
from training.bias.run import run
from training.bias.study import MIN_GROUP
from training.bias.study import Study as BiasStudy
from training.build.assemble import without_nan
from training.build.embed import embedder, read_images
from training.build.selection import PEOPLE, PROMPTS, Selection, group_names
from training.build.settings import BuildSettings
from training.defense.calibrate import answered
from training.defense.data import Drawings, split_by_concept
from training.defense.data import StudyData as DefenseData
from training.defense.measure import correct, mean
from training.defense.observe import Decoder
from training.defense.study import EPSILONS, Attacker, Study, StudySettings
from training.defense.victim import to_images

# Gendered pairs that the bias study looks at, of each part: its time grows with them, its intervals hardly shrink.
BIAS_LIMIT = 2_000
# Of each gender, to fit on and to choose or report on.
MIN_FITTED, MIN_JUDGED = 20, 8
# With fewer pairs without a person retrieval is measured on all.
MIN_THINGS = 50
# Clean images that set the detector's thresholds, and labels that a bundle brings.
CLEAN_LIMIT, LABEL_LIMIT = 200, 1_000
FALSE_POSITIVES = 0.01


class Skipped(Exception):
    """Why a calibration is left out."""


@dataclass(frozen=True)
class OwnBiasData(BiasData):
    """Pairs of one's own; of things without people there may be none.

    Attributes
    ----------
    unlimited : dict of str to array
        The columns before `limited`, by which a caption is of a gender.
    """

    unlimited: dict[str, np.ndarray]

    @property
    def said(self) -> dict[str, np.ndarray]:
        """The columns that say what a caption is of."""
        return self.unlimited

    def cluster(self, index: np.ndarray) -> np.ndarray:
        """Return a number for each pair, shared by those of one group, or else of one image.

        What a caption says besides the gender, which is how the corpus is clustered, may be the same for all:
        "a photo of a woman", "a photo of a man".
        """
        names = group_names(self.columns)[index].astype(str)
        return np.unique(names, return_inverse=True)[1]

    def things(self, part: str) -> np.ndarray:
        """Return the pairs of a part without a gender; all of them where those are few."""
        index = self.embeddings.where(part)
        things = index[(self.columns["gender"][index] == "") & (self.columns["category"][index] == "")]
        return things if len(things) >= MIN_THINGS else index


def limited(selection: Selection) -> dict[str, np.ndarray]:
    """Return the columns with labels of people on at most `BIAS_LIMIT` pairs of each part."""
    columns = dict(selection.columns)
    labelled = (columns["gender"] != "") | (columns["profession"] != "")
    kept = labelled.copy()
    for part in ("fit", "pool", "validation", "test"):
        inside = np.flatnonzero(labelled & (selection.embeddings.part == part))
        kept[np.random.default_rng(0).permutation(inside)[BIAS_LIMIT:]] = False
    for name in ("gender", "profession"):
        columns[name] = np.where(kept, columns[name], "")
    # What was left out is still no thing.
    columns["category"] = np.where(labelled, "People & Body", "").astype(object)
    return columns


def calibrate_bias(
    bundle: Bundle, selection: Selection, people: np.ndarray, settings: BuildSettings
) -> tuple[BiasCalibration, dict[str, Any]]:
    """Return the bundle's section and the figures.

    Parameters
    ----------
    bundle : Bundle
        With dictionaries and modality tables.
    selection : Selection
        Its pairs.
    people : float32 array, shape (2, prompts, d)
        Unit embeddings of the prompts of a woman and of a man.
    settings : BuildSettings
        Of the build.

    Raises
    ------
    Skipped
        Where too few pairs say a gender, or too few groups or captions.
    """
    columns = limited(selection)
    data = OwnBiasData(selection.embeddings, columns, gender_direction(*people), selection.columns)
    check_people(data)
    audit = AuditSettings(
        data.embeddings.logit_scale, settings.resamples, settings.resamples, MIN_GROUP, settings.seed
    )
    try:
        study = BiasStudy(bundle, data, audit)
        calibration, metrics = run(study, True, nothing, always=("LEACE",), compare_on_test=False)
    except NotEnoughItems as error:
        raise Skipped(str(error)) from error
    prompts = {who: tuple(prompt.format(who) for prompt in PROMPTS) for who in PEOPLE}
    return replace(calibration, prompts=prompts), metrics


def check_people(data: OwnBiasData) -> None:
    """Raise Skipped unless pairs and captions of either gender are enough, and of enough groups for intervals."""
    for parts, least in (
        (("fit", "pool"), MIN_FITTED),
        (("validation",), MIN_JUDGED),
        (("test",), MIN_JUDGED),
    ):
        index = data.people(*parts)
        for who in PEOPLE:
            pairs = index[data.gender[index] == GENDER[who]]
            where = " and ".join(parts)
            if len(pairs) < least:
                raise Skipped(f"{len(pairs)} pairs of {where} are of a {who}; {least} are needed")
            check_groups(data, pairs, f"the pairs of {where} that are of a {who}")
    captions = data.captions()
    for who in PEOPLE:
        pairs = captions.pair[captions.gender == GENDER[who]]
        check_groups(data, pairs, f"the captions that only pairs of a {who} have")


def check_groups(data: OwnBiasData, pairs: np.ndarray, what: str) -> None:
    """Raise Skipped where pairs are of too few groups or images for an interval."""
    found = len(np.unique(data.cluster(pairs)))
    if found < MIN_CLUSTERS:
        raise Skipped(f"{what} are of {found} groups or images; {MIN_CLUSTERS} are needed")


def nothing(line: str) -> None:
    """Tell nobody."""


def write_bias(calibration: BiasCalibration, work: Path) -> list[Path]:
    """Write the section, and return its files."""
    paths = [work / BIAS / f"{BIAS}{suffix}" for suffix in (".json", ".safetensors")]
    calibration.write(paths[0], paths[1])
    return paths


class Pictures:
    """Images of the pairs at the tower's size, read again from where they came.

    Parameters
    ----------
    selection : Selection
        The pairs.
    settings : BuildSettings
        With the sources.
    """

    def __init__(self, selection: Selection, settings: BuildSettings) -> None:
        self._selection, self._settings = selection, settings
        self._fit = ImagePreprocess(embedder(settings.work / "clip", settings.device).config).fit

    def read(self, index: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Return images in [0, 1], (B, 3, H, W), and which of `index` they are; changed files are left out."""
        columns = self._selection.columns
        places = [(columns["source"][i], int(columns["row"][i])) for i in index]
        data = read_images(self._settings.pairs, places)
        pixels, found = [], []
        for i, place in zip(index, places, strict=True):
            try:
                pixels.append(np.asarray(self._fit(decode_image(data[place]))))
                found.append(i)
            except (KeyError, ImageError):
                continue
        if not found:
            raise Skipped("the images cannot be read again")
        return to_images(np.stack(pixels)), np.array(found)


def defense_data(selection: Selection, settings: BuildSettings) -> tuple[DefenseData, DefenseData]:
    """Return what the defence is calibrated on, and the same among the labels of test images too, to report on.

    Halves of validation calibrate it. A label that only test images have is no target of the attacks that calibrate
    it, and no wrong answer of the filters that are chosen. An image's label is its column `label`, or its caption.

    Raises
    ------
    Skipped
        Where images cannot be read again, or validation has a single label.
    """
    embeddings, columns = selection.embeddings, selection.columns
    captions = columns["caption"].astype(str)
    label = columns["label"] if (columns["label"] != "").any() else captions
    rng = np.random.default_rng(settings.seed)
    validation = rng.permutation(selection.where("validation"))
    validation = validation[label[validation] != ""]
    if len(np.unique(label[validation])) < 2:
        raise Skipped("validation images of two labels are needed")
    first = split_by_concept(label[validation], settings.seed)
    pictures = Pictures(selection, settings)
    halves = [pictures.read(validation[half][:CLEAN_LIMIT]) for half in (first, ~first)]
    test = rng.permutation(selection.where("test"))
    tested = pictures.read(test[label[test] != ""][: settings.attack_images])
    known = np.unique(label[np.concatenate([index for _, index in halves])])
    names, count = np.unique(label[selection.where("fit", "pool", "validation")], return_counts=True)
    bundled = np.sort(names[names != ""][np.argsort(-count[names != ""], kind="stable")[:LABEL_LIMIT]])
    towers = embedder(settings.work / "clip", settings.device)
    bundled_units = towers.texts(bundled.tolist())

    def among(labels: np.ndarray) -> DefenseData:
        def drawings(found: tuple[torch.Tensor, np.ndarray]) -> Drawings:
            of = label[found[1]]
            inside = np.isin(of, labels)
            return Drawings(found[0][torch.from_numpy(inside)], np.searchsorted(labels, of[inside]))

        return DefenseData(
            clean_units=embeddings.images[selection.where("fit", "pool")],
            calibration=drawings(halves[0]),
            evaluation=drawings(halves[1]),
            calibration_clean=halves[0][0],
            evaluation_clean=halves[1][0],
            test=drawings(tested),
            labels=tuple(labels.tolist()),
            texts=torch.from_numpy(towers.texts(labels.tolist())),
            bundled=tuple(bundled.tolist()),
            bundled_units=bundled_units,
        )

    return among(known), among(np.union1d(known, label[tested[1]]))


def calibrate_defense(
    bundle: Bundle, selection: Selection, settings: BuildSettings, tell: Callable[[float], None]
) -> tuple[DefenseCalibration, dict[str, Any]]:
    """Return the bundle's section, and what it is worth on test images.

    Raises
    ------
    Skipped
        Where the images cannot be read again, or have too few labels.
    """
    data, reported = defense_data(selection, settings)
    sizes = StudySettings(
        images=2 * min(settings.attack_images, len(data.calibration.truth)),
        steps=settings.attack_steps,
        false_positive_rate=FALSE_POSITIVES,
        seed=settings.seed,
    )
    study = Study(bundle, data, sizes, cache=settings.work / "attacks", tell=lambda line: tell(1.0))
    calibration = study.calibrate(study.seen())
    metrics = {
        "settings": {
            "images": sizes.images // 2,
            "steps": sizes.steps,
            "false_positive_rate": FALSE_POSITIVES,
        },
        "labels": len(reported.labels),
        "test": test_metrics(study, calibration, reported, tell),
    }
    return replace(calibration, metrics=metrics), metrics


def test_metrics(
    study: Study, calibration: DefenseCalibration, reported: DefenseData, tell: Callable[[float], None]
) -> list[dict[str, Any]]:
    """Return, for clean and for attacked test images, the share called adversarial and accuracy before and after."""
    decoder, drawings = Decoder.of(study.dictionary), reported.test
    texts, truth = reported.texts.numpy(), drawings.truth
    attacker = Attacker(study.victim, reported, study.settings.steps, study.cache)
    rows = []
    for epsilon in (0, *EPSILONS):
        images = attacker.attack("pgd", epsilon, drawings) if epsilon else drawings.images
        observed = study.observe(images)
        row: dict[str, Any] = {"attack": f"PGD, {epsilon} / 255" if epsilon else "none", "images": len(truth)}
        row["accuracy"] = mean(correct(observed.unit, texts, truth), truth)
        for name, second_look in (("one_look", False), ("two_looks", True)):
            called, after, _ = answered(
                observed, calibration, decoder, second_look=second_look, false_positive_rate=FALSE_POSITIVES
            )
            row[name] = {"called": mean(called, truth), "accuracy": mean(correct(after, texts, truth), truth)}
        rows.append(row)
        tell(1.0)
    return without_nan(rows)


def write_defense(calibration: DefenseCalibration, work: Path) -> list[Path]:
    """Write the section, and return its files."""
    paths = [work / DEFENSE / f"{DEFENSE}{suffix}" for suffix in (".json", ".safetensors")]
    calibration.write(paths[0], paths[1])
    return paths
