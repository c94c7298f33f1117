"""Attack the bundle's towers, calibrate the defence on it, and measure what it is worth.

``python -m training.defense.run --bundle bundles/emoji --corpus work/corpus`` attacks validation drawings, writes
the bundle's ``defense/`` section with its manifest, ``work/defense.json`` with every figure and ``work/defense.md``
with the same as tables. About ten minutes on one core; ``--images`` and ``--steps`` scale it. ``--test`` adds
openmoji, once, at the end. The attacks are white-box: they know every weight, and `adaptive` knows the defence too.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.bundle.load import DEFENSE, Bundle, refresh_manifest
from services.defense import DefenseCalibration
from training.build.assemble import without_nan
from training.build.embedded import DEFAULT_OUT
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.defense import evaluate, tables
from training.defense.data import load
from training.defense.sample import write_attacked
from training.defense.study import Study, StudySettings
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS


def run(study: Study, test: bool) -> tuple[DefenseCalibration, dict[str, Any]]:
    """Calibrate, measure, and return both."""
    seen = study.seen()
    calibration = study.calibrate(seen)
    study.say("calibrated")
    drawings = study.data.evaluation.first(study.settings.images)
    pictures = study.attacked(drawings)
    context = evaluate.Context(study, calibration, seen, drawings, pictures)
    metrics: dict[str, Any] = {
        "settings": vars(study.settings),
        "samples": {
            "calibration_clean": len(seen.clean),
            "calibration_attacked": len(seen.base),
            "evaluation_clean": len(context.harmless["as drawn"]),
            "evaluation_attacked": len(drawings.truth),
            "labels": len(study.data.labels),
        },
        "detection": evaluate.detection(context),
        "false_positives": evaluate.false_positives(context),
        "single_scores": evaluate.single_scores(context),
        "robustness": evaluate.robustness(context),
        "targeted": evaluate.targeted(context),
    }
    study.say("measured what does not know the defence")
    metrics["baselines"] = evaluate.baselines(context)
    study.say("measured the baselines")
    metrics["adaptive"] = evaluate.adaptive_metrics(context)
    study.say("measured the adaptive attack")
    if test:
        metrics["openmoji"] = evaluate.test_artist(context)
        study.say("measured openmoji")
    metrics["minutes"] = round((time.monotonic() - study.started) / 60, 1)
    return calibration, without_nan(metrics)


def write(
    bundle: Path,
    calibration: DefenseCalibration,
    metrics: dict[str, Any],
    work: Path,
    docs: Path | None = None,
) -> None:
    """Write the bundle's section, its manifest, the figures, and the tables of a documentation page."""
    replace(calibration, metrics=metrics).write(
        bundle / DEFENSE / f"{DEFENSE}.json", bundle / DEFENSE / f"{DEFENSE}.safetensors"
    )
    refresh_manifest(bundle)
    work.mkdir(parents=True, exist_ok=True)
    (work / "defense.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    (work / "defense.md").write_text(tables.markdown(metrics))
    if docs is not None:
        docs.write_text(tables.put_into(docs.read_text(), metrics))


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--dictionary", default="", help="default: the bundle's default dictionary")
    parser.add_argument("--images", type=int, default=StudySettings.images)
    parser.add_argument("--steps", type=int, default=StudySettings.steps)
    parser.add_argument("--adaptive-images", type=int, default=StudySettings.adaptive_images)
    parser.add_argument("--seed", type=int, default=StudySettings.seed)
    parser.add_argument("--test", action="store_true", help="report on the test artist too: at the very end")
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced, such as docs/defence.md")
    parser.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    arguments = parser.parse_args()
    settings = StudySettings(
        images=arguments.images,
        steps=arguments.steps,
        adaptive_images=arguments.adaptive_images,
        seed=arguments.seed,
    )
    bundle = Bundle.load(arguments.bundle)
    data = load(
        arguments.embeddings,
        arguments.corpus,
        bundle.manifest.clip.fingerprint,
        bundle.clip_config.image_size,
        settings.seed,
        settings.images,
    )
    study = Study(bundle, data, settings, arguments.dictionary, arguments.work / "defense")
    calibration, metrics = run(study, arguments.test)
    print(tables.markdown(metrics))
    if not arguments.dry_run:
        write(arguments.bundle, calibration, metrics, arguments.work, arguments.docs)
        write_attacked(arguments.bundle)


if __name__ == "__main__":
    main()
