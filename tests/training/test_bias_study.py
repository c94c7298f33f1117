"""What the bias study chooses by, what a caption is of, and what is resampled together, on the tiny bundle's towers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.bias.audit import AuditSettings
from services.bias.cases import MAN, UNGENDERED, WOMAN
from services.bias.gender import gender_direction
from services.bundle.load import Bundle
from services.errors import NotEnoughItems
from services.modality.modalities import Modality
from training.bias import choose as choosing
from training.bias import tables
from training.bias.choose import Choice, choose
from training.bias.data import agreed, codes
from training.bias.study import Study
from training.build import studies
from training.build.selection import PEOPLE, Selection
from training.build.settings import BuildSettings
from training.build.studies import OwnBiasData, Skipped, calibrate_bias, defense_data, limited
from training.towers.embed import EmbeddingSet

NAN = float("nan")
PARTS = ("fit", "pool", "validation", "test")
PEOPLE_UNITS = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)
SETTINGS = BuildSettings(out=Path("out"), work=Path("work"), model="tiny", resamples=20)


def row(method: str, image: float, text: float, *, kept: float = 1.0, auc: float = 0.9) -> dict:
    sides = {"image": image, "text": text}
    return {
        "method": method,
        "features": 0 if method == "nothing" else 4,
        "r1_kept": kept,
        **{side: {"probe": probe, "auc": auc} for side, probe in sides.items()},
    }


def alike(rows: list[dict], verdict: str = "EFFECT") -> dict[str, dict]:
    """Return audits of one verdict and no harm."""
    return {row["method"]: {"verdict": verdict, "harms": []} for row in rows}


def test_the_strongest_verdict_chooses_before_any_figure_and_then_the_fewest_harms() -> None:
    rows = [row("nothing", 0.5, 0.5), *(row(name, p, p) for name, p in (("a", 0.5), ("b", 0.7), ("c", 0.6)))]
    audits = alike(rows) | {"a": {"verdict": "THRESHOLD_ONLY", "harms": []}}
    assert choose(rows, audits).method == "c"
    audits["c"] = {"verdict": "EFFECT", "harms": ["worst_group_accuracy"]}
    assert choose(rows, audits).method == "b"
    audits["b"] = {"verdict": "SILENCED", "harms": []}
    assert choose(rows, audits).method == "c"


def test_the_least_of_a_trained_classifier_chooses_among_those_that_keep_enough() -> None:
    rows = [row("nothing", 0.5, 0.5), row("a", 0.7, 0.7), row("b", 0.6, 0.7), row("c", 0.5, 0.5, kept=0.9)]
    assert choose(rows, alike(rows)) == Choice("b", "probe", ("image", "text"))


def test_a_side_on_which_no_classifier_can_be_trained_has_no_say() -> None:
    rows = [row("nothing", NAN, 0.5), row("a", NAN, 0.7), row("b", NAN, 0.6)]
    assert choose(rows, alike(rows)) == Choice("b", "probe", ("text",))


def test_without_a_classifier_the_auc_nearest_to_one_half_chooses() -> None:
    rows = [row("nothing", NAN, NAN, auc=0.5)]
    rows += [row(name, NAN, NAN, auc=auc) for name, auc in (("a", 0.9), ("b", 0.1), ("c", 0.6))]
    assert choose(rows, alike(rows)) == Choice("c", "auc", ("image", "text"))


def test_where_none_keeps_enough_the_least_loss_chooses() -> None:
    rows = [row("nothing", 0, 0), row("a", 0.1, 0.1, kept=0.5), row("b", 0.3, 0.3, kept=0.6)]
    assert choose(rows, alike(rows)) == Choice("b", "r1_kept", ())


def test_nothing_is_chosen_by_a_figure_that_is_not_defined() -> None:
    with pytest.raises(NotEnoughItems, match="no ablation can be chosen"):
        choose(rows := [row("a", NAN, NAN, auc=NAN), row("b", NAN, NAN, auc=NAN)], alike(rows))


def test_a_caption_is_gendered_only_if_all_its_pairs_agree() -> None:
    caption = np.array([0, 0, 1, 1, 2, 2, 4])
    gender = np.array([WOMAN, WOMAN, WOMAN, MAN, WOMAN, UNGENDERED, MAN])
    found = agreed(caption, gender, np.array([0, 1, 2, 4]))
    assert found.tolist() == [WOMAN, UNGENDERED, UNGENDERED, MAN]
    assert agreed(caption[::-1], gender[::-1], np.array([1])).tolist() == [UNGENDERED]


def selection(
    captions: list[str],
    genders: list[str],
    *,
    professions: list[str] | None = None,
    groups: list[str] | None = None,
    labels: list[str] | None = None,
) -> Selection:
    """Pairs of random embeddings, women's and men's apart along one axis, dealt to the parts in turn."""
    rng = np.random.default_rng(0)
    n = len(captions)
    names = np.unique([*captions, *PEOPLE])
    images, texts = rng.normal(size=(n, 16)), rng.normal(size=(1, len(names), 16))
    images[:, 0] += 2 * (np.array(genders) == "woman") - 2 * (np.array(genders) == "man")
    said = dict(zip(captions, genders, strict=True))
    texts[0, :, 0] += [{"woman": 2, "man": -2}.get(said.get(name, ""), 0) for name in names]
    images, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    empty = np.full(n, "", dtype=object)
    embeddings = EmbeddingSet(
        fingerprint="f" * 64,
        logit_scale=10.0,
        rows=np.arange(n),
        images=images.astype(np.float32),
        image_norm=np.ones(n, np.float32),
        caption=np.searchsorted(names, captions),
        part=np.array([PARTS[i // 2 % len(PARTS)] for i in range(n)]),
        view_images=np.empty((0, 16), np.float32),
        view_caption=np.zeros(0, np.int64),
        captions=names,
        texts=texts.astype(np.float32),
        text_norm=np.ones((1, len(names)), np.float32),
    )
    columns = {
        "source": np.full(n, "pairs.csv", dtype=object),
        "row": np.arange(n),
        "key": np.array([f"{i}.png" for i in range(n)], dtype=object),
        "caption": np.array(captions, dtype=object),
        "concept": np.array(captions, dtype=object),
        "gender": np.array(genders),
        "profession": np.array(professions or [""] * n),
        "label": np.array(labels or [""] * n),
        "group": np.array(groups or [""] * n, dtype=object),
        "set": np.full(n, "pairs.csv", dtype=object),
        **dict.fromkeys(("tone", "category", "split"), empty),
    }
    return Selection(embeddings, columns, dict.fromkeys(PARTS, n // 4))


def own(pairs: Selection) -> OwnBiasData:
    return OwnBiasData(pairs.embeddings, limited(pairs), gender_direction(*PEOPLE_UNITS), pairs.columns)


GENDERS = ["woman", "man"] * 120
DISTINCT = [f"a photo of a {who} number {i // 2}" for i, who in enumerate(GENDERS)]


def test_own_photos_of_two_captions_are_resampled_one_by_one_or_by_group() -> None:
    captions = [f"a photo of a {who}" for who in GENDERS]
    alone = own(selection(captions, GENDERS))
    index = np.arange(len(GENDERS))
    assert len(set(alone.cluster(index))) == len(GENDERS)
    grouped = own(selection(captions, GENDERS, groups=[f"person {i % 10}" for i in index]))
    assert (grouped.cluster(index) == grouped.cluster(index)[index % 10]).all()
    assert len(set(grouped.cluster(index))) == 10


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        (selection(DISTINCT, GENDERS, groups=[f"person {i % 3}" for i in range(240)]), "3 groups"),
        (selection([f"a photo of a {who}" for who in GENDERS], GENDERS), "captions .* of 1 groups"),
        (selection([f"a doctor {i // 2}" for i in range(240)], GENDERS), "captions .* of 0 groups"),
        (selection(DISTINCT[:40], GENDERS[:40]), "10 pairs of fit and pool"),
    ],
    ids=["few groups", "two captions", "captions of both", "few pairs"],
)
def test_a_calibration_that_could_say_nothing_is_left_out_with_a_reason(
    tiny: Bundle, pairs: Selection, why: str
) -> None:
    with pytest.raises(Skipped, match=why):
        calibrate_bias(tiny, pairs, PEOPLE_UNITS, SETTINGS)


def test_pairs_that_are_all_gendered_are_studied_and_the_record_says_what_chose(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random captions are not retrieved, so that there is nothing to keep.
    monkeypatch.setattr(choosing, "KEEP", 0.0)
    calibration, metrics = calibrate_bias(tiny, selection(DISTINCT, GENDERS), PEOPLE_UNITS, SETTINGS)
    assert metrics["chosen_by"] == calibration.metrics["chosen_by"]
    assert metrics["chosen_by"] == {"figure": "probe", "sides": ["image", "text"]}
    ablations = [r for r in metrics["validation"]["methods"] if r["features"]]
    audited = {found["method"]: found for found in metrics["candidates"]}
    assert set(audited) == {r["method"] for r in ablations}
    # Random towers know nothing, so that removing something comes to nothing much; all the same the rule holds.
    strongest = max(choosing.STRENGTH.index(found["verdict"]) for found in audited.values())
    best = [r for r in ablations if choosing.STRENGTH.index(audited[r["method"]]["verdict"]) == strongest]
    fewest = min(len(audited[r["method"]]["harms"]) for r in best)
    best = [r for r in best if len(audited[r["method"]]["harms"]) == fewest]
    nearest = min(best, key=lambda r: sum(abs(r[side]["probe"] - 0.5) for side in ("image", "text")))
    assert metrics["chosen"] == nearest["method"]
    assert metrics["test"]["audits"][0]["recalibrated"]["skew"]["before"]["value"] is None
    assert "by how little a classifier" in tables.summary(metrics)


def test_a_doctor_of_women_and_of_men_is_an_ungendered_text(tiny: Bundle) -> None:
    doctors = [f"a doctor {i // 2}" if i < 16 else caption for i, caption in enumerate(DISTINCT)]
    professions = ["doctor" if i < 16 else "" for i in range(240)]
    cases = own(selection(doctors, GENDERS, professions=professions)).texts(tiny.dictionary())
    assert set(cases.gender[cases.profession == "doctor"]) == {UNGENDERED}
    assert set(cases.gender[cases.profession == ""]) == {WOMAN, MAN}


def test_pairs_beyond_the_limit_still_say_what_a_caption_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = selection([f"a doctor {i // 2}" for i in range(240)], GENDERS)
    monkeypatch.setattr(studies, "BIAS_LIMIT", 8)
    assert set(own(pairs).captions().gender) == {UNGENDERED}


def test_means_of_texts_are_over_captions_that_were_fitted_on(tiny: Bundle) -> None:
    pairs = selection(DISTINCT, GENDERS)
    dictionary = tiny.dictionary()
    study = Study(tiny, own(pairs), AuditSettings(10.0, 20, 20))
    embeddings = pairs.embeddings
    fitted = np.unique(embeddings.caption[embeddings.where("fit", "pool")])
    expected = codes(dictionary, embeddings.texts[0, fitted], Modality.TEXT).mean(axis=0)
    # float32 sums in another order.
    np.testing.assert_allclose(
        study.calibrate(dictionary).sides[Modality.TEXT].means, np.asarray(expected).ravel(), atol=1e-6
    )


class Embedder:
    """Stands for the towers: an embedding for every text."""

    def texts(self, names: list[str]) -> np.ndarray:
        return np.ones((len(names), 16), np.float32) / 4


class Pictures:
    """Stands for the images: one value each, its number."""

    def __init__(self, *_: object) -> None:
        pass

    def read(self, index: np.ndarray):
        import torch

        return torch.from_numpy(index.astype(np.float32))[:, None, None, None].expand(-1, 3, 1, 1), index


def test_labels_that_only_test_images_have_are_no_labels_of_the_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = [("zebra" if PARTS[i // 2 % 4] == "test" and i % 3 else f"thing {i % 5}") for i in range(240)]
    pairs = selection(DISTINCT, GENDERS, labels=labels)
    monkeypatch.setattr(studies, "Pictures", Pictures)
    monkeypatch.setattr(studies, "embedder", lambda *_: Embedder())
    data, reported = defense_data(pairs, SETTINGS)
    assert data.labels == tuple(f"thing {i}" for i in range(5))
    assert reported.labels == (*data.labels, "zebra")
    assert len(data.texts) == 5 and len(reported.texts) == 6
    for found in (data, reported):
        for drawings in (found.calibration, found.evaluation, found.test):
            numbers = drawings.images[:, 0, 0, 0].numpy().astype(int)
            assert [found.labels[place] for place in drawings.truth] == [labels[i] for i in numbers]
    assert len(reported.test.truth) == SETTINGS.attack_images
    assert 0 < len(data.test.truth) < len(reported.test.truth)


def test_validation_images_of_one_label_calibrate_no_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "Pictures", Pictures)
    monkeypatch.setattr(studies, "embedder", lambda *_: Embedder())
    pairs = selection(DISTINCT, GENDERS, labels=["thing"] * 240)
    with pytest.raises(Skipped, match="two labels"):
        defense_data(pairs, SETTINGS)
