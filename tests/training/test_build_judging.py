"""The judges of a build of one's own: what EmbSim and WinRate are made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.dictionaries import SAE
from training.build import judging
from training.build.judging import judge_pairs
from training.build.selection import Selection
from training.build.settings import BuildSettings
from training.modality.judges import Judges
from training.modality.score import monosemanticity
from training.towers.embed import EmbeddingSet

N, DIM = 120, 16


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> Selection:
    """Forty concepts, three pairs each, a caption each; the judges see what the embeddings say."""
    rng = np.random.default_rng(0)
    concept = np.arange(N) // 3
    captions = np.array([f"thing {i:03d}" for i in range(N)])

    def unit(x: np.ndarray) -> np.ndarray:
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    images = unit(rng.standard_normal((40, DIM))[concept] + 0.1 * rng.standard_normal((N, DIM)))
    embeddings = EmbeddingSet(
        fingerprint="f" * 64,
        logit_scale=10.0,
        rows=np.arange(N),
        images=images,
        image_norm=np.ones(N, np.float32),
        caption=np.arange(N),
        part=np.array(["fit"] * 30 + ["pool"] * 60 + ["validation"] * 30),
        view_images=images[:0],
        view_caption=np.zeros(0, np.int64),
        captions=captions,
        texts=images[None],
        text_norm=np.ones((1, N), np.float32),
    )
    columns = {"concept": np.array([f"c{c}" for c in concept])}

    def seen(chosen: np.ndarray) -> np.ndarray:
        return images[np.searchsorted(captions, chosen)].astype(np.float16)

    monkeypatch.setattr(judging, "judge_texts", seen)
    return Selection(embeddings, columns, {})


def score(selection: Selection, path: Path) -> tuple[dict, dict]:
    torch.manual_seed(0)
    dictionary = SAE(DIM, 12, 8).eval().requires_grad_(False)
    return monosemanticity(
        dictionary, selection.embeddings, Judges.load(path), selection.columns["concept"].astype(str)
    )


def test_images_and_captions_that_are_held_out_are_judged_and_fill_the_columns(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    def pictures(chosen: Selection, settings: BuildSettings, index: np.ndarray):  # noqa: ANN202
        # One picture cannot be read any more.
        yield index[1:], torch.zeros(len(index) - 1, 3, 4, 4)

    monkeypatch.setattr(judging, "_pictures", pictures)
    monkeypatch.setattr(
        judging, "judge_images", lambda pixels: selection.embeddings.images[31:].astype(np.float16)
    )
    settings = BuildSettings(out=tmp_path, work=tmp_path, model="m", pairs=(tmp_path / "pairs.csv",))
    judge_pairs(selection, settings, tmp_path / "judges.npz", told.append)
    judges = Judges.load(tmp_path / "judges.npz")
    assert judges.rows.tolist() == list(range(31, 120))
    assert judges.captions.tolist() == selection.embeddings.captions[30:].tolist()
    assert sum(told) == 89
    columns, means = score(selection, tmp_path / "judges.npz")
    assert set(columns) == {"emb_sim_image", "win_rate_image", "emb_sim_text", "win_rate_text"}
    for side in ("image", "text"):
        assert np.isfinite(columns[f"win_rate_{side}"]).any()
        # A sample as a direction fires on its neighbours, and the judge here sees as the towers do.
        baseline = means[side]["embeddings"]["win_rate"]["10"]
        assert baseline["mean"] > 0.55
        assert baseline["features"] <= 30


def test_without_pictures_the_captions_alone_are_judged(selection: Selection, tmp_path: Path) -> None:
    settings = BuildSettings(out=tmp_path, work=tmp_path, model="m")
    judge_pairs(selection, settings, tmp_path / "judges.npz", lambda units: None)
    columns, means = score(selection, tmp_path / "judges.npz")
    assert set(columns) == {"emb_sim_text", "win_rate_text"}
    assert set(means) == {"text"}
