"""A build from beginning to end; what an earlier run finished is not done again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from services.bundle.load import Bundle
from services.imaging.reference import folder_sha256
from training.build import finish
from training.build.assemble import check_replaceable
from training.build.bad_rows import BAD_ROWS, check_bad_share, write_bad_rows
from training.build.describe import (
    JUDGES,
    card_samples,
    card_thumbnails,
    describe_one,
    measure,
    towers_figures,
    write_json,
)
from training.build.dictionaries import recipe, train_one, units
from training.build.embed import (
    Task,
    embedder,
    fitting,
    make_shard,
    missing,
    plan,
    read_images,
    sources,
    store_key,
)
from training.build.errors import BuildError
from training.build.judging import JUDGED, judge_pairs
from training.build.page import render
from training.build.pipeline import left_adapters, locate, pipeline_entry
from training.build.progress import Reporter
from training.build.selection import PEOPLE, PEOPLE_FILE, PROMPTS, Selection, select
from training.build.settings import BuildSettings
from training.build.stages import Stages
from training.build.store import Store
from training.build.studies import Skipped, calibrate_bias, calibrate_defense, write_bias, write_defense
from training.build.towers import fetch_towers
from training.build.workers import run_all, threads
from training.dictionaries.choose import CANDIDATES
from training.modality.score import HELD_OUT

# What the defence tells while it is calibrated and judged.
DEFENSE_TELLS = 8


def run(settings: BuildSettings, console: Console) -> Bundle:
    """Build, and return the bundle.

    Raises
    ------
    BuildError
        Where the build cannot go on.
    """
    if not set(settings.kinds) & set(CANDIDATES):
        raise BuildError(
            f"one of {', '.join(CANDIDATES)} is needed: the default dictionary is chosen of them"
        )
    check_replaceable(settings.out)
    with Reporter(console) as reporter, threads(1):
        build = Build(settings, reporter)
        bundle = build.run()
        reporter.say(f"{bundle.id}: {len(bundle.manifest.files)} files in {settings.out}")
    return bundle


class Build:
    """One run of a build.

    Parameters
    ----------
    settings : BuildSettings
        What to build.
    reporter : Reporter
        Shows how far it is.
    """

    def __init__(self, settings: BuildSettings, reporter: Reporter) -> None:
        self.settings, self.reporter, self.work = settings, reporter, settings.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.stages = Stages(self.work)
        self.skips: list[str] = []

    def run(self) -> Bundle:
        """Do all that is not done."""
        settings = self.settings
        fingerprint = fetch_towers(settings.model, settings.pretrained, settings.revision, self.work / "clip")
        if settings.pipeline:
            self._pipeline(fingerprint)
        store = embed(settings, self.reporter)
        with_people(store, self.work / "clip", settings.device)
        self.store = store.folder
        self.selection, self.readable = only_readable(select(self.store, settings), settings)
        self.pairs = {"store": store.digest(), "limits": self._limits()}
        self._dictionaries()
        self._judges()
        self._tables()
        self._figures()
        self._thumbnails()
        study = finish.study_bundle(self.work, settings, self._manifest_parts())
        self._bias(study)
        self._defense(study)
        self._report()
        return finish.write_bundle(self.work, settings, self._manifest_parts(), fingerprint)

    def _pipeline(self, fingerprint: str) -> None:
        folder = locate(self.settings)
        for name in left_adapters(folder, pipeline_entry(folder, fingerprint)):
            self.reporter.say(
                f"{name} is an adapter, which is not applied: merge it into the pipeline's weights"
            )
        checked = self.work / "pipeline.checked"

        def make() -> list[Path]:
            finish.check_pipeline(self.work, self.settings, fingerprint)
            checked.write_text(fingerprint, encoding="utf-8")
            return [checked]

        self.stages.run("pipeline", {"towers": fingerprint, "pipeline": folder_sha256(folder)}, make)

    def _limits(self) -> list[int]:
        s = self.settings
        return [s.fit_limit, s.table_limit, s.evaluation_limit]

    def _dictionaries(self) -> None:
        s, dim = self.settings, self.selection.embeddings.images.shape[1]
        fit = len(self.selection.where("fit"))
        jobs = []
        for number in range(s.seeds):
            for name in s.kinds:
                made = recipe(name, s, dim, fit, s.seed + number)
                if number == 0 or made is not None:
                    stage = f"dictionary-{name}-{number}"
                    inputs = {**self.pairs, "recipe": repr(made)}
                    jobs.append((stage, inputs, name, number, units(name, made)))
        todo = [job for job in jobs if not self.stages.is_done(job[0], job[1])]
        # The longest first, so that the last one does not run alone.
        todo.sort(key=lambda job: -job[4])
        total = sum(job[4] for job in jobs)
        out = self.work / "dictionaries"
        for folder in out.glob("seed*"):
            # Of an earlier run with more seeds: figures take whatever seeds are there.
            if int(folder.name.removeprefix("seed")) >= s.seeds:
                shutil.rmtree(folder)
        with self.reporter.stage("dictionaries, steps", total) as stage:
            stage.advance(total - sum(job[4] for job in todo))
            run_all(
                train_one,
                [(self.store, s, name, number, out) for _, _, name, number, _ in todo],
                s.workers,
                stage.advance,
                lambda i, files: self.stages.finish(todo[i][0], todo[i][1], files),
            )

    def _trained(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what a stage that reads dictionaries hangs on."""
        made = {
            f"{name}-{number}": self.stages.outputs(f"dictionary-{name}-{number}")
            for name in names
            for number in range(self.settings.seeds)
        }
        return {**self.pairs, "dictionaries": made}

    def _judges(self) -> None:
        inputs = {**self.pairs, "seed": self.settings.seed, "readable": self.readable}
        total = min(JUDGED, len(self.selection.where(*HELD_OUT))) if self.settings.pairs else 0

        def make() -> list[Path]:
            with self.reporter.stage("judging", total) as stage:
                return judge_pairs(self.selection, self.settings, self.work / JUDGES, stage.advance)

        self.stages.run("judges", inputs, make)

    def _tables(self) -> None:
        s = self.settings
        judged = self.stages.outputs("judges")
        jobs = [(f"tables-{name}", self._trained([name]) | {"judges": judged}, name) for name in s.kinds]
        todo = [job for job in jobs if not self.stages.is_done(job[0], job[1])]
        with self.reporter.stage("tables and cards", len(jobs)) as stage:
            stage.advance(len(jobs) - len(todo))
            run_all(
                describe_one,
                [(self.store, s, name, self.work) for _, _, name in todo],
                s.workers,
                stage.advance,
                lambda i, files: self.stages.finish(todo[i][0], todo[i][1], files),
            )

    def _figures(self) -> None:
        s, work = self.settings, self.work
        inputs = {**self._trained(s.kinds), "k": s.k, "kinds": list(s.kinds)}
        # Dictionaries of an earlier run with other --kind are not this bundle's.
        for file in (work / "dictionaries").glob("**/*.json"):
            if file.stem not in s.kinds:
                file.unlink()

        def make() -> list[Path]:
            tables = {name: json.loads((work / "summaries" / f"{name}.json").read_text()) for name in s.kinds}
            with self.reporter.stage("figures", 2 * (len(s.kinds) + 2) + 1) as stage:
                found = measure(self.selection, s, work, tables, lambda line: stage.advance())
            write_json(work / "dictionaries.json", found)
            write_json(work / "modality.json", tables)
            write_json(work / "retrieval.json", towers_figures(self.selection))
            return [work / f"{name}.json" for name in ("dictionaries", "modality", "retrieval")]

        self.stages.run("figures", inputs, make)

    def _thumbnails(self) -> None:
        s, path = self.settings, self.work / "cards" / "images.parquet"
        if not s.thumbnails or not s.pairs:
            path.unlink(missing_ok=True)
            self.skips.append("Cards show no pictures: " + ("not asked for." if s.pairs else "no --pairs."))
            return
        inputs = {
            **self.pairs,
            "cards": [self.stages.outputs(f"tables-{name}") for name in s.kinds],
            **({} if self.readable is True else {"readable": self.readable}),
        }

        def make() -> list[Path]:
            wanted = card_samples(self.work, s.kinds, self.selection)
            with self.reporter.stage("thumbnails", 1):
                found = read_images(s.pairs, list(wanted.values()))
                images = {sample: found[place] for sample, place in wanted.items() if place in found}
                config = embedder(self.work / "clip", s.device).config
                return [card_thumbnails(self.work, s.kinds, images, config)]

        self.stages.run("thumbnails", inputs, make)

    def _default(self) -> str:
        found = json.loads((self.work / "dictionaries.json").read_text(encoding="utf-8"))
        return str(found["default"])

    def _study(self, name: str, title: str, wanted: bool | None, inputs: dict[str, Any], total: int,
               make: Callable[[Callable[[float], None]], tuple[list[Path], dict[str, Any]]]) -> None:  # fmt: skip
        """Run one calibration, or note why it is left out."""
        figures, files = self.work / f"{name}.json", self.work / name
        why = self.work / f"{name}.skipped"
        if wanted is False:
            for file in (figures, *files.glob("*")):
                file.unlink(missing_ok=True)
            self.skips.append(f"{title}: not asked for.")
            return
        if wanted:
            # Who insists is not answered by what an earlier run was content with: it is tried again.
            why.unlink(missing_ok=True)

        def study() -> list[Path]:
            for file in (figures, why, *files.glob("*")):
                file.unlink(missing_ok=True)
            try:
                with self.reporter.stage(title, total) as stage:
                    made, found = make(stage.advance)
            except Skipped as error:
                if wanted:
                    raise BuildError(f"{title}: {error}") from error
                why.write_text(str(error), encoding="utf-8")
                return [why]
            write_json(figures, found)
            return [*made, figures]

        self.stages.run(name, inputs, study)
        if why.exists():
            self.skips.append(f"{title}: {why.read_text(encoding='utf-8')}.")

    def _bias(self, study: Bundle) -> None:
        s = self.settings
        people = np.load(self.store / PEOPLE_FILE, allow_pickle=False)
        inputs = {
            **self._trained(s.kinds),
            "resamples": s.resamples,
            "seed": s.seed,
            "default": self._default(),
        }

        def make(tell: Callable[[float], None]) -> tuple[list[Path], dict[str, Any]]:
            calibration, figures = calibrate_bias(study, self.selection, people, s)
            return write_bias(calibration, self.work), figures

        self._study("bias", "Gender bias", s.bias, inputs, 1, make)

    def _defense(self, study: Bundle) -> None:
        s = self.settings
        inputs = {
            **self._trained(s.kinds), "images": s.attack_images, "steps": s.attack_steps, "seed": s.seed,
            "default": self._default(), "readable": self.readable,
        }  # fmt: skip

        def make(tell: Callable[[float], None]) -> tuple[list[Path], dict[str, Any]]:
            if not s.pairs:
                raise Skipped("no --pairs, so no images to attack")
            calibration, figures = calibrate_defense(study, self.selection, s, tell)
            return write_defense(calibration, self.work), figures

        self._study("defense", "Adversarial images", s.defense, inputs, DEFENSE_TELLS, make)

    def _report(self) -> None:
        s = self.settings
        bad = sum(len(entry.bad) for entry in Store.open(self.store).shards())
        parts = ("fit", "pool", "validation", "test")
        pairs = {
            "counts": self.selection.counts,
            "used": {part: len(self.selection.where(part)) for part in parts},
            "skipped": bad,
        }
        page = render(self.work, s.bundle_name, finish.description(s), pairs, self.skips)
        (self.work / "report.html").write_text(page, encoding="utf-8")

    def _manifest_parts(self) -> finish.ManifestParts:
        """Return what the manifest says that no file does."""
        store = Store.open(self.store)
        return finish.ManifestParts(
            default=self._default(),
            pairs={**self.selection.counts, "skipped": sum(len(entry.bad) for entry in store.shards())},
            store=store.key,
            selection=self.selection,
        )


def embed(settings: BuildSettings, reporter: Reporter) -> Store:
    """Return the embeddings of the pairs, or the finished ones that the settings name.

    Raises
    ------
    BuildError
        Where no pair can be used, or finished embeddings are of other towers or of other pairs.
    """
    clip = settings.work / "clip"
    key = store_key(clip, settings.templates, settings.dtype, settings.device)
    if settings.embeddings is not None:
        store = Store.open(settings.embeddings)
        if store.key.fingerprint != key.fingerprint:
            raise BuildError(f"{settings.embeddings} holds embeddings of other towers than {settings.model}")
        if settings.pairs:
            check_pairs(store, settings, reporter)
        return store
    opened = sources(settings.pairs)
    # What a table says is read in seconds, and embedding takes hours.
    broken = [[source.name, row.row, row.key, row.reason] for source in opened for row in source.broken()]
    write_bad_rows(broken, settings.work / BAD_ROWS)
    check_bad_share(broken, sum(len(source) for source in opened) - len(broken), settings)
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
    bad = [row for entry in store.shards() for row in entry.bad]
    write_bad_rows(bad, settings.work / BAD_ROWS)
    good = sum(entry.rows for entry in store.shards())
    rows = len(bad) + good
    if bad:
        share = f"{len(bad) / rows:.1%}, at most {settings.max_bad_share:.1%} may be"
        reporter.say(f"{len(bad)} of {rows} rows were skipped ({share}); {settings.work / BAD_ROWS} says why")
    check_bad_share(bad, good, settings)
    return store


def check_pairs(store: Store, settings: BuildSettings, reporter: Reporter) -> None:
    """Tell how many pairs of finished embeddings have no picture in `--pairs`.

    Raises
    ------
    BuildError
        Where none has: hours of training would come before anyone sees it.
    """
    rows = store.rows()
    fits = fitting(settings.pairs, {name: rows[name].to_pylist() for name in ("source", "row", "key")})
    if not fits.any():
        raise BuildError(
            f"{settings.embeddings} was not made from these --pairs: none of its {len(fits)} rows is in a file of the "
            "same name, at the same place, with the same path or key"
        )
    if not fits.all():
        reporter.say(
            f"{(~fits).sum()} of {len(fits)} pairs of {settings.embeddings} are not where they were in --pairs: "
            "they go without a picture"
        )


def only_readable(selection: Selection, settings: BuildSettings) -> tuple[Selection, bool | str]:
    """Take the source from pairs that are no longer there, so that no picture of another pair is read for theirs.

    Returns
    -------
    selection : Selection
        Its column "source" is "" for those.
    readable : bool or str
        What stages that read pictures hang on: whether there are any, or where some are not, a hash of which.
    """
    if settings.embeddings is None or not settings.pairs:
        return selection, bool(settings.pairs)
    fits = fitting(settings.pairs, selection.columns)
    if fits.all():
        return selection, True
    columns = {**selection.columns, "source": np.where(fits, selection.columns["source"], "")}
    return replace(selection, columns=columns), hashlib.sha256(fits.tobytes()).hexdigest()


def _make_shard(
    paths: tuple[Path, ...], clip: Path, store: Store, task: Task, tell: Callable[[float], None]
) -> None:
    make_shard(paths, clip, store, task)
    tell(task.stop - task.start)


def with_people(store: Store, clip: Path, device: str) -> None:
    """Add the embeddings of the prompts of a woman and of a man to a store, float32 [2, prompts, d]."""
    path = store.folder / PEOPLE_FILE
    if path.exists():
        return
    towers = embedder(clip, device)
    people = np.stack([towers.texts([prompt.format(who) for prompt in PROMPTS]) for who in PEOPLE])
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.save(file, people, allow_pickle=False)
    part.replace(path)
