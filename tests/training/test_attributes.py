"""Attribute directions: planted ones are found, within concepts, and what measures them measures it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from services.dictionaries import SAE
from services.imaging.dose import Attribute, AttributeEntry, Attributes, whitening_of
from training.build.embedded_steps import steps
from training.imaging.attributes import (
    COLOURS,
    Pool,
    contrasts,
    differences,
    fit,
    joined,
    pursuit,
    without_words,
)
from training.imaging.colour import NAMED, colour_shares
from training.imaging.probes import classes
from training.imaging.run import parse
from training.imaging.study import DOSES, Study, by_concept

D, N, CONCEPTS = 24, 96, 40


def planted(confounded: bool = True) -> tuple[Pool, np.ndarray, SAE, np.ndarray]:
    """Drawings of people by two artists; smiles are features 3 and 7, and women smile in other concepts than men.

    Returns
    -------
    tuple
        The pool, the change that gender makes, the dictionary, and the ids of the change.
    """
    rng = np.random.default_rng(0)
    dictionary = SAE(D, N, 8)
    with torch.no_grad():
        rows = torch.from_numpy(rng.standard_normal((N, D)).astype(np.float32))
        dictionary.decoder.copy_(rows / rows.norm(dim=1, keepdim=True))
    rows = dictionary.decoder_rows("image").detach().numpy()
    ids = np.array([3, 7])
    change = 1.5 * rows[3] - 0.8 * rows[7]
    raw, columns = [], {name: [] for name in ("concept", "set", "gender", "caption")}
    for c in range(CONCEPTS):
        base = 3 * rng.standard_normal(D)
        for artist in ("a", "b"):
            for gender in ("woman", "man"):
                raw.append(base + (change if gender == "woman" else 0) + 0.05 * rng.standard_normal(D))
                columns["concept"].append(f"{gender} doing {c}")
                columns["caption"].append(f"{gender} doing {c}")
                columns["set"].append(artist)
                columns["gender"].append(gender)
    # Other concepts, drawn once: they say nothing of gender, and lie far away.
    for c in range(CONCEPTS if confounded else 0):
        raw.append(50 * rows[11] + rng.standard_normal(D))
        columns["concept"].append(f"woman alone {c}")
        columns["caption"].append(f"woman alone {c}")
        columns["set"].append("a")
        columns["gender"].append("woman")
    n = len(raw)
    told = {name: np.array(values) for name, values in columns.items()}
    told |= {name: np.full(n, "") for name in ("tone", "colour")}
    told |= {"style": np.full(n, "plain"), "family": told["set"], "name": told["concept"]}
    return Pool(np.array(raw, np.float32), told), change, dictionary, ids


def contrast_of(pool: Pool, name: str) -> object:
    return next(one for one in contrasts(pool.columns) if one.name == name)


def test_a_difference_is_taken_within_concepts_alone() -> None:
    pool, change, _, _ = planted()
    found, shared, pairs = differences(pool, contrast_of(pool, "woman"))  # type: ignore[arg-type]
    assert (len(found), len(np.unique(shared)), pairs) == (2 * CONCEPTS, 2 * CONCEPTS, 2 * CONCEPTS)
    # Between concepts the difference would be full of the direction of those drawn once.
    np.testing.assert_allclose(found.mean(0), change, atol=0.05)


def test_a_planted_sparse_direction_is_found() -> None:
    pool, change, dictionary, ids = planted()
    made = fit(pool, contrast_of(pool, "woman"), whitening_of(pool.raw), dictionary)  # type: ignore[arg-type]
    assert made is not None
    attribute, dense = made
    assert set(ids) <= set(attribute.ids)
    assert (attribute.entry.group, attribute.entry.pairs) == ("gender", 2 * CONCEPTS)
    rows = dictionary.decoder_rows("image").detach().numpy()
    sparse = attribute.values @ rows[attribute.ids]
    for direction in (sparse, dense):
        cosine = direction @ change / (np.linalg.norm(direction) * np.linalg.norm(change))
        assert cosine > 0.98


def test_what_few_concepts_tell_is_not_fitted() -> None:
    pool, _, dictionary, _ = planted()
    assert fit(pool, contrast_of(pool, "smile"), whitening_of(pool.raw), dictionary) is None  # type: ignore[arg-type]


def test_pursuit_takes_no_atom_twice_and_fits_exactly_with_enough() -> None:
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((50, 10))
    target = 2 * atoms[4] - atoms[9]
    ids, weights = pursuit(target, atoms, 10)
    assert len(set(ids)) == 10
    np.testing.assert_allclose(weights @ atoms[ids], target, atol=1e-8)


def test_words_are_replaced_whole() -> None:
    found = without_words(np.array(["woman with red hair", "womanly man"]), {"woman": "*", "man": "*"})
    assert found.tolist() == ["* with red hair", "womanly *"]
    assert joined(np.array(["a", "b"]), np.array(["c", "d"])).tolist() == ["a|c", "b|d"]


@pytest.mark.parametrize("name", COLOURS)
def test_ink_has_the_colour_that_most_of_it_is_nearest_to(name: str) -> None:
    picture = np.full((1, 16, 16, 3), 255, np.uint8)
    picture[:, 4:12, 4:12] = NAMED[name]
    picture[:, 4:6, 4:12] = NAMED["red" if name != "red" else "blue"]
    shares = colour_shares(picture)[0]
    assert list(NAMED)[shares.argmax()] == name
    assert shares[list(NAMED).index(name)] == pytest.approx(0.75)
    assert colour_shares(np.full((1, 4, 4, 3), 255, np.uint8)).sum() == 0


def test_an_interval_counts_concepts_and_keeps_its_width_at_the_ends() -> None:
    same = by_concept([1.0] * 8 + [0.0] * 8, ["a"] * 8 + ["b"] * 8)
    assert (same.low, same.high) == (0.0, 1.0)
    spread = by_concept([1.0, 0.0] * 8, [str(i // 2) for i in range(16)])
    assert spread.low > 0.2
    whole = by_concept([1.0] * 16, [str(i) for i in range(16)])
    assert whole.value == whole.high == 1.0
    # Wilson's lower bound of 16 in 16.
    assert whole.low == pytest.approx(16 / (16 + 1.96**2), abs=1e-6)


def test_classes_are_told_by_metadata_and_words() -> None:
    columns = {
        "concept": np.array(["a wave", "a wave", "a rock", "grinning cat", "crying face"]),
        "caption": np.array(["a wave", "a wave dark", "a rock", "grinning cat", "crying face"]),
        "tone": np.array(["", "dark", "", "", ""]),
        "category": np.array(["People & Body"] * 3 + ["Smileys & Emotion"] * 2),
    }
    assert classes("skin tone", columns).tolist() == ["no tone", "dark skin", "", "", ""]
    assert classes("expression", columns).tolist() == ["", "", "", "smile", "frown"]


def test_the_study_is_part_of_the_whole_recipe_after_the_generator() -> None:
    import argparse

    values = {"work": Path("w"), "corpus": Path("c"), "clip": Path("t"), "out": Path("b"), "test": False}
    numbers = {"workers": 1, "seeds": 1, "views": 1, "fit_limit": 0, "effort": 1.0}
    names = [command[0] for command in steps(argparse.Namespace(**values, **numbers))]
    assert names.index("training.imaging.run") > names.index("training.diffusion.export")


def planned_study(hits: dict[str, dict[float, float]], asked: list[tuple[str, float]]) -> Study:
    """A study of pictures that are not drawn: each attribute hits as planned, by dose, and always keeps its concept."""
    study: Any = object.__new__(Study)
    study.name, study.steps, study.whitening = "sae", 4, np.eye(3, dtype=np.float32)
    study.bundle = SimpleNamespace(manifest=SimpleNamespace(files={}))
    columns = {
        "split": np.full(8, "validation"),
        "concept": np.array([f"thing {i}" for i in range(8)]),
        "category": np.full(8, "Objects"),
    }
    study.corpus = SimpleNamespace(columns=columns)
    study.probes = SimpleNamespace(accuracy={"colour": 0.9})
    study.fitted = [
        Attribute(AttributeEntry(name, "colour", 0.0, 9, 9), np.array([i]), np.ones(1, np.float32))
        for i, name in enumerate(hits)
    ]
    study.choose_unit = lambda features, seed: (0.9, 0.25, {"features": features})

    def measure(attribute: Attribute, doses: Any, concepts: Any, seed: int, config: Any) -> list[Any]:
        name = attribute.entry.name
        asked.extend((name, dose) for dose in doses)
        n = len(concepts)
        return [
            {
                "hit": (np.arange(n) < n * hits[name].get(dose, 0.0)).astype(float),
                "kept": np.ones(n),
                "off": 0.5,
            }
            for dose in doses
        ]

    study.measure = measure
    found: Study = study
    return found


def test_the_smallest_dose_that_reaches_the_goals_is_chosen_and_the_rest_left_out(tmp_path: Path) -> None:
    rising = dict(zip(DOSES, (0.2, 0.8, 1.0, 1.0), strict=True))
    asked: list[tuple[str, float]] = []
    study = planned_study({"blue": rising, "red": dict.fromkeys(DOSES, 0.5)}, asked)
    known = study.run("f" * 64, choosing=10, measuring=20, features=3, keep=tmp_path / "kept.json")
    assert list(known.attributes) == ["blue"]
    entry = known.attributes["blue"].entry
    assert entry.dose == DOSES[1]
    assert entry.measures is not None
    assert (entry.measures.pictures, entry.measures.hit.value, entry.measures.hit_before.value) == (
        20,
        0.8,
        0.0,
    )
    assert entry.measures.kept.value == 1.0
    assert known.config.evidence["left_out"]["red"]["hit"] == 0.5
    assert (known.config.unit, known.config.fade) == (0.9, 0.25)
    known.write(tmp_path / "attributes")
    assert Attributes.read(tmp_path / "attributes").config == known.config


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    hits = {name: dict.fromkeys(DOSES, 1.0) for name in ("blue", "red")}
    keep, asked = tmp_path / "kept.json", list[tuple[str, float]]()
    planned_study({"blue": hits["blue"]}, asked).run("f" * 64, 4, 4, 3, keep)
    first = len(asked)
    again = planned_study(hits, asked).run("f" * 64, 4, 4, 3, keep)
    assert list(again.attributes) == ["blue", "red"]
    assert {name for name, _ in asked[first:]} == {"red"}
    # Of other numbers nothing is taken over.
    planned_study(hits, asked).run("f" * 64, 5, 4, 3, keep)
    assert {name for name, _ in asked[2 * first :]} == {"blue", "red"}


def test_the_command_takes_what_the_recipe_gives_it() -> None:
    import argparse

    values = {"work": Path("w"), "corpus": Path("c"), "clip": Path("t"), "out": Path("b"), "test": False}
    numbers = {"workers": 1, "seeds": 1, "views": 1, "fit_limit": 0, "effort": 1.0}
    commands = {command[0]: command[1:] for command in steps(argparse.Namespace(**values, **numbers))}
    asked = parse(commands["training.imaging.run"])
    assert (asked.bundle, asked.corpus, asked.clip) == (Path("b"), Path("c"), Path("t"))
    assert asked.if_possible
    assert asked.keep.name.endswith(".json")
