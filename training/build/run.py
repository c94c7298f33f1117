"""A build from beginning to end; what an earlier run finished is not done again."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.console import Console

from training.build.embed import Task, make_shard, missing, plan, sources, store_key
from training.build.errors import BuildError
from training.build.progress import Reporter
from training.build.settings import BuildSettings
from training.build.store import Store
from training.build.towers import fetch_towers
from training.build.workers import run_all

BAD_ROWS = "bad_rows.csv"


def run(settings: BuildSettings, console: Console) -> None:
    """Build."""
    with Reporter(console) as reporter:
        fetch_towers(settings.model, settings.pretrained, settings.revision, settings.work / "clip")
        embed(settings, reporter)


def embed(settings: BuildSettings, reporter: Reporter) -> Store:
    """Return the embeddings of the pairs, or the finished ones that the settings name.

    Raises
    ------
    BuildError
        Where no pair can be used, or finished embeddings are of other towers.
    """
    clip = settings.work / "clip"
    key = store_key(clip, settings.templates, settings.dtype, settings.device)
    if settings.embeddings is not None:
        store = Store.open(settings.embeddings)
        if store.key.fingerprint != key.fingerprint:
            raise BuildError(f"{settings.embeddings} holds embeddings of other towers than {settings.model}")
        return store
    opened = sources(settings.pairs)
    store = Store(settings.work / "embeddings" / key.digest(), key)
    tasks = plan(opened, settings.shard_rows)
    todo = missing(store, opened, tasks)
    total = sum(task.stop - task.start for task in tasks)
    with reporter.stage("embeddings", total) as stage:
        stage.advance(total - sum(task.stop - task.start for task in todo))
        arguments = [(settings.pairs, clip, store, task) for task in todo]
        # On a GPU one process is enough to keep it busy, and all that fits.
        run_all(_make_shard, arguments, 1 if settings.device == "cuda" else settings.workers, stage.advance)
    store.finish([task.name for task in tasks])
    bad = write_bad_rows(store, settings.work / BAD_ROWS)
    good = sum(entry.rows for entry in store.shards())
    if bad:
        reporter.say(f"{bad} of {bad + good} rows were skipped; {settings.work / BAD_ROWS} says why")
    if not good:
        raise BuildError(f"no row of the pairs can be used; {settings.work / BAD_ROWS} says why")
    return store


def _make_shard(paths: tuple[Path, ...], clip: Path, store: Store, task: Task, tell) -> None:
    make_shard(paths, clip, store, task)
    tell(task.stop - task.start)


def write_bad_rows(store: Store, path: Path) -> int:
    """List the rows that were skipped, and return how many there are."""
    rows = [row for entry in store.shards() for row in entry.bad]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "row", "key", "reason"])
        writer.writerows(rows)
    return len(rows)
