"""A build from beginning to end; what an earlier run finished is not done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from services.bundle.load import Bundle
from services.imaging.reference import folder_sha256
from training.build import finish
from training.build.assemble import check_replaceable
from training.build.describe import (
    JUDGES,
    card_samples,
    card_thumbnails,
    describe_one,
    measure,
    tower_metrics,
    write_json,
)
from training.build.dictionaries import recipe, train_one, units
from training.build.embed import embed, embedder, only_readable, read_images, with_people
from training.build.errors import BuildError
from training.build.judging import JUDGED, judge_pairs
from training.build.page import render
from training.build.pipeline import left_adapters, locate, pipeline_entry
from training.build.progress import Reporter
from training.build.selection import PEOPLE_FILE, select
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
        self._metrics()
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

    def _metrics(self) -> None:
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
            write_json(work / "retrieval.json", tower_metrics(self.selection))
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
        document, files = self.work / f"{name}.json", self.work / name
        why = self.work / f"{name}.skipped"
        if wanted is False:
            for file in (document, *files.glob("*")):
                file.unlink(missing_ok=True)
            self.skips.append(f"{title}: not asked for.")
            return
        if wanted:
            # Who insists is not answered by what an earlier run was content with: it is tried again.
            why.unlink(missing_ok=True)

        def study() -> list[Path]:
            for file in (document, why, *files.glob("*")):
                file.unlink(missing_ok=True)
            try:
                with self.reporter.stage(title, total) as stage:
                    made, found = make(stage.advance)
            except Skipped as error:
                if wanted:
                    raise BuildError(f"{title}: {error}") from error
                why.write_text(str(error), encoding="utf-8")
                return [why]
            write_json(document, found)
            return [*made, document]

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
            calibration, metrics = calibrate_bias(study, self.selection, people, s)
            return write_bias(calibration, self.work), metrics

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
            calibration, metrics = calibrate_defense(study, self.selection, s, tell)
            return write_defense(calibration, self.work), metrics

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
