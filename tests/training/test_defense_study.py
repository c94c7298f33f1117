"""The study, end to end on a tiny bundle; its differentiable twin of the service; and redteam."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer import Typer
from typer.testing import CliRunner

from services.bundle.load import Bundle
from services.defense import DefenseCalibration, FilterChoice, FilterMode
from services.defense.smoothing import noise
from services.modality.modalities import Modality
from training.defense import redteam as redteam_module
from training.defense.adaptive import Defended, adaptive, evasion, loud, straight_through
from training.defense.attacks import random_start
from training.defense.baselines import counterattack, noise_averaging, pca, principal_directions
from training.defense.calibrate import answered
from training.defense.data import Drawings, StudyData, split_by_concept
from training.defense.measure import auroc, mean
from training.defense.observe import Decoder, observe, scores
from training.defense.redteam import ATTACKS, Subject, find_images, redteam
from training.defense.run import run, write
from training.defense.study import Study, StudySettings
from training.defense.tables import BEGIN, END, markdown, put_into


def drawings(count: int, seed: int, side: int) -> torch.Tensor:
    """Flat shapes on white: what the noise score takes for clean."""
    rng = np.random.default_rng(seed)
    images = torch.ones(count, 3, side, side)
    for image in images:
        for _ in range(2):
            y, x = rng.integers(2, side // 2, 2)
            h, w = rng.integers(4, side // 2, 2)
            image[:, y : y + h, x : x + w] = torch.from_numpy(rng.random((3, 1, 1))).float()
    return images


@pytest.fixture(scope="module")
def data(tiny: Bundle) -> StudyData:
    side = tiny.clip_config.image_size[0]
    rng = np.random.default_rng(0)
    texts = torch.nn.functional.normalize(
        torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )

    def some(count: int, seed: int) -> Drawings:
        return Drawings(drawings(count, seed, side), rng.integers(0, 6, count))

    clean = rng.standard_normal((40, 16)).astype(np.float32)
    return StudyData(
        clean_units=clean / np.linalg.norm(clean, axis=1, keepdims=True),
        calibration=some(8, 1),
        evaluation=some(8, 2),
        calibration_clean=drawings(60, 3, side),
        evaluation_clean=drawings(20, 4, side),
        test=some(4, 5),
        labels=tuple("abcdef"),
        texts=texts,
        bundled=tuple("abcdefgh"),
        bundled_units=np.concatenate([texts.numpy(), texts.numpy()[:2]]),
    )


@pytest.fixture(scope="module")
def studied(tiny: Bundle, data: StudyData, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("studied") / "tiny"
    shutil.copytree(tiny.path, folder)
    bundle = Bundle.load(folder)
    study = Study(bundle, data, StudySettings(images=6, steps=2, adaptive_images=4, clean_images=20))
    calibration, metrics = run(study, test=True)
    write(folder, calibration, metrics, folder.parent / "work")
    return study, calibration, metrics, folder


def test_the_study_writes_a_section_that_the_bundle_loads_with(studied) -> None:
    _, calibration, metrics, folder = studied
    bundle = Bundle.load(folder)
    assert bundle.manifest.defense is not None
    read = DefenseCalibration.read(
        folder / bundle.manifest.defense.config, folder / bundle.manifest.defense.weights
    )
    assert read.tower_fingerprint == bundle.manifest.clip.fingerprint
    assert read.choices == calibration.choices
    assert json.loads((folder.parent / "work" / "defense.json").read_text()) == read.metrics == metrics


def test_every_table_has_every_row(studied) -> None:
    _, _, metrics, folder = studied
    attacks = {f"{a} {e}/255" for a in ("pgd", "apgd", "match") for e in (1, 4, 8)} | {"typographic"}
    for name in ("detection", "single_scores"):
        assert set(metrics[name]) == attacks
    assert set(metrics["robustness"]) == attacks | {"clean"}
    assert set(metrics["targeted"]) == {f"match {e}/255" for e in (1, 4, 8)} | {"typographic"}
    text = markdown(metrics)
    assert (folder.parent / "work" / "defense.md").read_text() == text
    for heading in (
        "Detection",
        "alone",
        "Clean pictures",
        "Accuracy",
        "Targeted",
        "Other",
        "knows",
        "openmoji",
    ):
        assert heading in text
    assert "nan" not in text


@pytest.mark.parametrize("second_look", [False, True])
@pytest.mark.parametrize(
    "choice", [FilterChoice(mode, keep) for mode in FilterMode for keep in (True, False)]
)
def test_what_the_adaptive_attack_differentiates_is_what_is_served(
    studied, second_look: bool, choice: FilterChoice
) -> None:
    if choice.mode is FilterMode.RESTORE and not second_look:
        pytest.skip("RESTORE needs a second look")
    study, calibration, _, _ = studied
    calibration = DefenseCalibration(
        **(vars(calibration) | {"choices": dict.fromkeys((False, True), choice)})
    )
    images = study.data.evaluation.images
    observed = study.observe(images)
    defended = Defended(study.victim, study.dictionary, calibration, second_look, 0.05)
    ours, _, filtered = defended.scores(images)
    decoder = Decoder.of(study.dictionary)
    served = scores(observed, calibration.statistics, decoder, second_look)
    # float32 against float64.
    np.testing.assert_allclose(ours.numpy(), served, atol=2e-5)
    logit = calibration.detectors[second_look].logit(served)
    np.testing.assert_allclose(defended.logit(ours).numpy(), logit, atol=1e-2)
    _, unit, _ = answered(
        observed, calibration, decoder, second_look=second_look, false_positive_rate=0.05, filter_all=True
    )
    np.testing.assert_allclose(filtered.numpy(), unit, atol=1e-4)


def test_the_documentation_gets_the_figures_between_its_marks(studied) -> None:
    metrics = studied[2]
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = put_into(page, metrics)
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    assert markdown(metrics) in once
    assert put_into(once, metrics) == once
    with pytest.raises(ValueError):
        put_into("no marks", metrics)
    assert BEGIN in (Path(__file__).parents[2] / "docs" / "defence.md").read_text()


def test_gradients_go_straight_through_topk(tiny: Bundle) -> None:
    dictionary = tiny.dictionary("sae")
    e = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    e.requires_grad_(True)
    z = straight_through(dictionary, e)
    with torch.no_grad():
        torch.testing.assert_close(z, dictionary.encode(e, Modality.IMAGE), atol=1e-6, rtol=0)
    weights = torch.rand(z.shape, generator=torch.Generator().manual_seed(1))
    (through,) = torch.autograd.grad((z * weights).sum(), e)
    pre = dictionary.pre_activations(e, Modality.IMAGE)
    (expected,) = torch.autograd.grad((pre.relu() * weights).sum(), e)
    torch.testing.assert_close(through, expected)


def test_a_careful_attacker_is_not_seen_by_the_noise_score() -> None:
    """Noise in the loud part of a drawing leaves r4 where it was; the same noise everywhere does not."""
    images = drawings(4, 0, 32)
    generator = torch.Generator().manual_seed(0)
    added = 8 / 255 * (torch.rand(images.shape, generator=generator) * 2 - 1)
    everywhere = (images + added).clamp(0, 1)
    careful = (images + loud(images) * added).clamp(0, 1)
    assert (noise(images) == 0).all()
    assert (noise(everywhere) > 2).all()
    torch.testing.assert_close(noise(careful), noise(images), atol=1e-3, rtol=0)  # float32, in levels


def test_the_adaptive_attack_keeps_to_its_budget_and_raises_its_loss(studied) -> None:
    study, calibration, _, _ = studied
    drawn = study.data.evaluation.first(4)
    defended = Defended(study.victim, study.dictionary, calibration, True, 0.05)
    loss = evasion(defended, study.data.texts, torch.from_numpy(drawn.truth), 1.0)
    moved = adaptive(loss, drawn.images, 8 / 255, steps=4, generator=torch.Generator().manual_seed(0))
    assert (moved - drawn.images).abs().max() <= 8 / 255 + 1e-6  # float32
    assert (loss(moved) > loss(drawn.images)).float().mean() >= 0.75


def test_concepts_do_not_straddle_the_halves() -> None:
    concepts = np.array(["a", "b", "c", "d"] * 5)
    first = split_by_concept(concepts, 0)
    assert set(concepts[first]).isdisjoint(concepts[~first])
    assert first.sum() == 10


def test_figures_are_what_a_reference_says() -> None:
    rng = np.random.default_rng(0)
    clean, attacked = rng.normal(0, 1, 50).round(1), rng.normal(1, 1, 40).round(1)
    figure = auroc(clean, attacked)
    truth = np.r_[np.zeros(50), np.ones(40)]
    assert figure["value"] == pytest.approx(roc_auc_score(truth, np.r_[clean, attacked]))
    assert figure["low"] < figure["value"] < figure["high"]
    share = mean(np.array([True] * 30 + [False] * 10))
    assert share["value"] == 0.75
    # Two standard errors of a share of 40.
    assert share["low"] == pytest.approx(0.75 - 1.96 * np.sqrt(0.75 * 0.25 / 40), abs=0.03)


def test_the_baselines_do_what_they_say(tiny: Bundle) -> None:
    study_images = drawings(3, 0, 32)
    from training.defense.victim import Victim

    victim = Victim(tiny)
    unit = victim.embed(study_images).numpy()
    rng = np.random.default_rng(0)
    mean_vector, directions = principal_directions(rng.standard_normal((50, 16)), 16)
    np.testing.assert_allclose(pca(unit, mean_vector, directions), unit, atol=1e-5)  # all directions kept
    np.testing.assert_allclose(noise_averaging(victim, study_images, 0.0, 2), unit, atol=1e-5)  # no noise
    # No budget, no counterattack.
    np.testing.assert_allclose(counterattack(victim, study_images, epsilon=0.0), unit, atol=1e-5)
    assert not np.allclose(counterattack(victim, study_images, epsilon=0.1, drift=10.0), unit, atol=1e-3)


def test_redteam_attacks_files_on_disk_and_writes_a_report(studied, tmp_path: Path) -> None:
    _, _, _, folder = studied
    for i in range(3):
        pixels = (drawings(1, i, 48)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    app = Typer()
    app.command()(redteam)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app,
        [
            str(tmp_path),
            "--bundle",
            str(folder),
            "--steps",
            "2",
            "--epsilon",
            "8",
            "--out",
            str(out),
            "--fpr",
            "0.05",
        ],
        env={"COLUMNS": "200"},
    )
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert [row["attack"] for row in report["attacks"]] == [
        "none", "pgd", "apgd", "match", "typographic", "adaptive",
    ]  # fmt: skip
    assert report["attacks"][0]["label_changed"] == 0
    assert len(list((out / "pgd-8").glob("*.png"))) == 3
    attacked = np.asarray(Image.open(sorted((out / "pgd-8").glob("*.png"))[0]))
    assert attacked.shape == (32, 32, 3)
    refused = CliRunner().invoke(app, [str(tmp_path / "missing.png"), "--bundle", str(folder)])
    assert refused.exit_code == 3


@pytest.fixture(scope="module")
def subject(studied, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    pictures = tmp_path_factory.mktemp("pictures")
    for i in range(7):
        pixels = (drawings(1, i, 32)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    return Subject.open(studied[3], find_images([pictures]), [], True, 0.05)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"typographic"}))
def test_redteam_attacks_a_few_pictures_at_a_time_from_the_same_starts_to_the_same_aims(
    subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack(batch: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        sizes, values = [], []

        def start_only(loss, images, epsilon, *, steps, generator):
            sizes.append(len(images))
            values.append(loss(images).detach())
            return random_start(images, epsilon, generator)

        monkeypatch.setattr(redteam_module, "BATCH", batch)
        for method in ("pgd", "apgd", "adaptive"):
            monkeypatch.setattr(redteam_module, method, start_only)
        moved = subject.attack(name, 8, steps=1, target=None, seed=3)
        return sizes, torch.cat(values), moved

    sizes, values, moved = attack(32)
    sizes_in_pieces, values_in_pieces, moved_in_pieces = attack(3)
    assert (sizes, sizes_in_pieces) == ([7], [3, 3, 1])
    # A product of another shape may add in another order; the detector's logit takes logarithms of small scores.
    torch.testing.assert_close(values_in_pieces, values, atol=1e-2, rtol=0)
    assert torch.equal(moved_in_pieces, moved)
    assert not torch.equal(moved, subject.pictures)


def test_redteam_says_that_a_bundle_has_no_calibration(tiny: Bundle, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    app = Typer()
    app.command()(redteam)
    done = CliRunner().invoke(app, [str(tmp_path / "a.png"), "--bundle", str(tiny.path)])
    assert done.exit_code == 3


def test_what_is_observed_does_not_depend_on_the_batch(studied) -> None:
    study = studied[0]
    images = study.data.evaluation.images
    whole, one = study.observe(images), observe(study.victim, study.dictionary, images[2:3])
    # A product of another shape may add in another order.
    np.testing.assert_allclose(whole.unit[2:3], one.unit, atol=1e-5)
    np.testing.assert_allclose(whole.noise[2:3], one.noise, atol=1e-4)
