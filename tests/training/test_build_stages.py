from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.build.errors import BuildError
from training.build.stages import Stages
from training.build.store import ShardEntry, Store, StoreKey

KEY = StoreKey("f" * 64, ("{}",), "float16", "torch", "cpu", "f32", 4, 10.0)
NAMES = ("source", "key", "caption", "gender", "profession", "label", "group", "split")


def test_a_stage_runs_once_and_again_when_an_input_or_an_output_changes(tmp_path: Path) -> None:
    file, stages = tmp_path / "out.txt", Stages(tmp_path)

    def make() -> list[Path]:
        file.write_text("made")
        return [file]

    assert stages.run("one", {"a": 1}, make)
    assert not stages.run("one", {"a": 1}, make)
    assert stages.run("one", {"a": 2}, make)
    file.write_text("half")
    assert stages.run("one", {"a": 2}, make)
    file.unlink()
    assert stages.run("one", {"a": 2}, make)


def test_a_stage_that_failed_is_not_finished(tmp_path: Path) -> None:
    stages = Stages(tmp_path)

    def fail() -> list[Path]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stages.run("one", {}, fail)
    assert not stages.is_done("one", {})


def written(folder: Path, rows: int = 3) -> Store:
    store = Store(folder, KEY)
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(rows, 4)), rng.normal(size=(1, rows, 4))
    columns = {name: ["x"] * rows for name in NAMES} | {"row": range(rows), "image_norm": [1.0] * rows}
    store.write(ShardEntry("000-000000", "d", rows, []), images, texts, columns)
    return store


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    written(tmp_path).finish(["000-000000"])
    store = Store.open(tmp_path)
    (shard,) = store.shards()
    expected = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float16)
    assert isinstance(store.side(shard, "images"), np.memmap)
    assert (store.side(shard, "images") == expected).all()
    assert store.rows().num_rows == 3
    assert store.key == KEY


def test_a_shard_without_its_json_is_not_there(tmp_path: Path) -> None:
    store = written(tmp_path)
    assert store.has("000-000000", "d")
    assert not store.has("000-000000", "other rows")
    (tmp_path / "000-000000.json").unlink()
    assert not store.has("000-000000", "d")


def test_a_finished_store_holds_nothing_of_runs_that_were_killed(tmp_path: Path) -> None:
    store = written(tmp_path)
    (tmp_path / "000-000000.images.npy.123.part").write_bytes(b"half")
    store.finish(["000-000000"])
    assert not list(tmp_path.glob("*.part"))
    assert Store.open(tmp_path).shards()


def test_a_store_that_was_not_finished_cannot_be_opened(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(BuildError, match="no finished embeddings"):
        Store.open(tmp_path)
