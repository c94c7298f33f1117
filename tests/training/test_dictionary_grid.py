from __future__ import annotations

import argparse
import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.dictionaries import grid as dictionary_grid
from training.dictionaries.grid import Cell, Grid, choose
from training.towers.embed import EmbeddingSet, EmbeddingSettings

DIM, CONCEPTS = 16, 12
GOOD = {
    "unresolved": 0.2,
    "kappa_seeds": 0.6,
    "rarest_label": 0.02,
    "dead": 0.0,
    "r1_codes_kept": 0.9,
    "fvu": 0.2,
}


class Here:
    """Runs at once what a pool of processes would run."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work, *arguments):  # noqa: ANN001, ANN201
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_of_the_cells_that_meet_the_most_targets_the_one_with_the_least_fvu_is_taken():
    rows = {
        "faithful": GOOD | {"fvu": 0.1, "unresolved": 0.4},
        "steady": GOOD,
        "steadier": GOOD | {"fvu": 0.25, "unresolved": 0.1, "kappa_seeds": 0.9},
        "one-sided": GOOD | {"fvu": 0.15, "rarest_label": 0.0},
    }
    assert choose(rows) == "steady"
    del rows["steady"], rows["steadier"]
    assert choose(rows) == "faithful"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Of a run on a world of twelve concepts, in this process."""
    monkeypatch.setattr(dictionary_grid, "ProcessPoolExecutor", Here)
    rng = np.random.default_rng(0)
    n = 240
    concept = np.arange(n) % CONCEPTS
    names = np.array(["man", "woman", *(f"thing {i:02d}" for i in range(CONCEPTS - 2))])
    captions = np.sort(names)

    def unit(x: np.ndarray) -> np.ndarray:
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    centres = rng.standard_normal((CONCEPTS, DIM))
    images = unit(centres[concept] + 0.3 * rng.standard_normal((n, DIM)))
    caption = np.searchsorted(captions, names[concept])
    part = np.array(["fit"] * 160 + ["pool"] * 40 + ["validation"] * 40)
    EmbeddingSet(
        fingerprint="f" * 64,
        logit_scale=10.0,
        rows=np.arange(n),
        images=images,
        image_norm=np.ones(n, np.float32),
        caption=caption,
        part=part,
        view_images=images[:0],
        view_caption=caption[:0],
        captions=captions,
        texts=unit(centres[np.argsort(names)] + 0.1)[None],
        text_norm=np.ones((1, CONCEPTS), np.float32),
    ).save(tmp_path / "embeddings.npz", EmbeddingSettings())
    columns = {
        "concept": names[concept],
        "gender": np.where(concept < 2, names[concept], ""),
        "tone": [""] * n,
    }
    pq.write_table(pa.table({k: list(map(str, v)) for k, v in columns.items()}), tmp_path / "corpus.parquet")
    return argparse.Namespace(
        embeddings=tmp_path / "embeddings.npz", corpus=tmp_path, out=tmp_path / "grid.json", workers=1,
        effort=0.02, sizes=[16, 24], weights=[0.2], kept=[4, 6],
    )  # fmt: skip


def test_one_setting_is_swept_after_the_other_and_what_is_measured_is_not_measured_again(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    Grid(arguments).run()
    document = json.loads(arguments.out.read_text())
    n = document["chosen"]["n_features"]
    # Two sizes at the first k; then the better one at the second k.
    assert list(document["cells"]) == [Cell(16, 0.2, 4).name, Cell(24, 0.2, 4).name, Cell(n, 0.2, 6).name]
    for row in document["cells"].values():
        assert sum(row["labels"].values()) == pytest.approx(1, abs=1e-3)
        assert 0 <= row["fvu"] < 2
    assert Cell(**document["chosen"]).name in document["why"]

    def refuse(*_: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(dictionary_grid, "train_cell", refuse)
    Grid(arguments).run()
    assert json.loads(arguments.out.read_text()) == document
    # Other towers, other choices.
    monkeypatch.undo()
    assert Grid(argparse.Namespace(**vars(arguments) | {"effort": 0.5})).document["cells"] == {}
