"""Measure gender bias of the bundle's towers, and what ablating features does about it.

``python -m training.bias.run --bundle bundles/emoji --corpus work/corpus`` fits on the training artists' drawings,
chooses on their held-out pairs (`training.bias.choose`), writes the bundle's ``bias/`` section with its manifest and
report, ``work/bias.json`` with every figure, and prints the tables. ``--test`` adds openmoji, once, at the end. No
tower is run: embeddings are read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.bias.audit import AuditSettings, audit_scores
from services.bias.calibration import BiasCalibration, DictionaryCalibration
from services.bias.cases import UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_scores
from services.bundle.load import BIAS, Bundle, refresh_manifest
from services.modality.modalities import Modality
from services.modality.tables import Label
from training.bias import tables
from training.bias.choose import KEEP, choose, enough_kept
from training.bias.data import StudyData
from training.bias.measure import Utility, by_artist, by_profession
from training.bias.methods import LABELS, Method, feature_methods, reference_methods
from training.bias.study import MIN_GROUP, TRAINING_ARTISTS, Study, audit_metrics
from training.build.assemble import without_nan
from training.build.embedded import DEFAULT_OUT
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.report.page import render
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.pairs import TEMPLATES

# What the bundle's section holds of the figures.
KEPT_FIGURES = ("dictionary", "chosen", "chosen_by", "candidates", "thresholds", "labels")
# Audited in full beside the chosen one.
ALWAYS = (*(f"label {label.value}, zero" for label in LABELS), "LEACE", "counterparts 1", "round trip")


def label_shares(labels: np.ndarray, known: DictionaryCalibration) -> dict[str, Any]:
    """Return what each modality label holds of gender: the paper says women in IMAGE, men in TEXT."""
    result: dict[str, Any] = {}
    for label in Label:
        member = labels == label.value
        entry: dict[str, Any] = {"features": int(member.sum())}
        for modality, side in known.sides.items():
            found = side.association
            entry[modality.value] = {
                "share_of_gap": round(float(found.share[member].sum()), 4),
                "of_women": int((found.low[member] > 0).sum()),
                "of_men": int((found.high[member] < 0).sum()),
            }
        result[label.value] = entry
    return result


def run(
    study: Study,
    test: bool,
    tell: Callable[[str], None] = print,
    *,
    always: Sequence[str] = ALWAYS,
    compare_on_test: bool = True,
) -> tuple[BiasCalibration, dict[str, Any]]:
    """Run everything; returns the bundle's section and the figures.

    Parameters
    ----------
    study : Study
        What to run.
    test : bool
        Report on the test part too.
    tell : callable
        Told how far it is.
    always : sequence of str
        Methods that are audited in full beside the chosen one.
    compare_on_test : bool
        Whether every method gets its quick figures on the test part, or only those that are audited.
    """
    data, bundle = study.data, study.bundle
    known = {name: study.calibrate(bundle.dictionary(name)) for name in bundle.dictionary_names}
    labels = bundle.modality(study.name).label
    sides = study.sides(known[study.name])
    methods = feature_methods(sides, labels, known[study.name].rank)
    fitted = {m: (e, woman) for m, (e, woman, _) in study.fitted.items()}
    methods += reference_methods(study.dictionary, data.direction, study.leace, fitted, study.counterparts())
    by_name = {method.name: method for method in methods}
    validation = study.cases("validation")
    rows = study.compare(methods, validation, Utility.of(data, study.dictionary, "validation"))
    candidates = [row["method"] for row in enough_kept(rows)]
    audits = {name: study.full(by_name[name], sides, validation) for name in candidates}
    choice = choose(rows, audits)
    chosen = choice.method
    tell(f"{tables.methods_table('Methods', rows, 'image').markdown()}\nchosen by {choice.figure}: {chosen}")
    thresholds = {
        Modality.IMAGE: study.threshold(validation.take(validation.gender != UNGENDERED)),
        Modality.TEXT: study.threshold(study.text_cases),
    }
    metrics: dict[str, Any] = {
        "dictionary": study.name,
        "logit_scale": study.settings.logit_scale,
        "chosen": chosen,
        "chosen_by": {"figure": choice.figure, "sides": list(choice.sides)},
        "keep": KEEP,
        "thresholds": {m.value: value for m, value in thresholds.items()},
        "labels": label_shares(labels, known[study.name]),
        "candidates": [
            {"method": name, "verdict": found["verdict"], "harms": found["harms"]}
            for name, found in audits.items()
        ],
        "validation": {"methods": rows},
        "texts": {},
    }
    full = [by_name[name] for name in dict.fromkeys((chosen, *always)) if name in by_name]
    parts = {"validation": validation} | ({"test": study.cases("test")} if test else {})
    if test:
        utility = Utility.of(data, study.dictionary, "test")
        reported = methods if compare_on_test else full
        metrics["test"] = {"methods": study.compare(reported, parts["test"], utility)}
    for part, cases in {**parts, "texts": study.text_cases}.items():
        started = time.monotonic()
        metrics[part]["counts"] = counts(cases)
        metrics[part]["audits"] = [study.full(method, sides, cases) for method in full]
        shift = gender_scores(cases.e, data.direction)
        moved = audit_scores(cases, shift, shift - shift[cases.gender != UNGENDERED].mean(), study.settings)
        metrics[part]["audits"].append({"method": "threshold shift", "features": 0, **audit_metrics(moved)})
        tell(f"{part}: {len(full)} audits in {time.monotonic() - started:.0f} s")
    metrics |= _professions(study, by_name[chosen], metrics, test)
    calibration = BiasCalibration(
        tower_fingerprint=bundle.manifest.clip.fingerprint,
        prompts={who: tuple(template.format(who) for template in TEMPLATES) for who in ("woman", "man")},
        direction=data.direction,
        thresholds=thresholds,
        leace=study.leace,
        dictionaries=known,
        metrics=without_nan({key: metrics[key] for key in KEPT_FIGURES}),
    )
    return calibration, without_nan(metrics)


def _professions(study: Study, chosen: Method, metrics: dict[str, Any], test: bool) -> dict[str, Any]:
    """Ungendered professions by artist and era, and by profession from drawings and from texts."""
    data, scale = study.data, study.settings.logit_scale
    index = data.ungendered_professions(*TRAINING_ARTISTS, *(("test",) if test else ()))
    cases = data.drawings(study.dictionary, index)
    after = chosen.plan.apply(cases)
    thresholds = tuple(metrics["validation"]["audits"][0]["thresholds"])
    before_s, after_s = gender_scores(cases.e, data.direction), gender_scores(after, data.direction)
    texts = study.text_cases
    after_texts = chosen.plan.apply(texts)
    return {
        "by_artist": by_artist(data, index, before_s, after_s, scale, thresholds),
        "by_profession": {
            "image": by_profession(cases, after, data.direction, scale),
            "text": by_profession(texts, after_texts, data.direction, scale),
        },
    }


def counts(cases: Cases) -> dict[str, int]:
    """Return how many items of each gender there are."""
    women, ungendered = int((cases.gender == WOMAN).sum()), int((cases.gender == UNGENDERED).sum())
    return {"women": women, "men": len(cases) - women - ungendered, "ungendered": ungendered}


def write(bundle: Path, calibration: BiasCalibration, metrics: dict[str, Any], work: Path) -> None:
    """Write the figures, the bundle's section and its report, and vouch for the bundle anew."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "bias.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    (work / "bias.md").write_text(tables.markdown(metrics))
    calibration.write(bundle / BIAS / f"{BIAS}.json", bundle / BIAS / f"{BIAS}.safetensors")
    # The other steps' figures are there when the bundle was made here; a study of a bundle alone leaves its report.
    if (work / "dictionaries.json").exists():
        page = render(work)
        for folder in (work, bundle):
            (folder / "report.html").write_text(page, encoding="utf-8")
    refresh_manifest(bundle)


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--dictionary", default="", help="default: the bundle's default dictionary")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--null-sets", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="report on the test artist too: at the very end")
    parser.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    arguments = parser.parse_args()
    started = time.monotonic()
    bundle = Bundle.load(arguments.bundle)
    data = StudyData.load(arguments.embeddings, arguments.corpus, bundle.manifest.clip.fingerprint)
    settings = AuditSettings(
        data.embeddings.logit_scale, arguments.resamples, arguments.null_sets, MIN_GROUP, arguments.seed
    )
    calibration, metrics = run(Study(bundle, data, settings, arguments.dictionary), arguments.test)
    print(tables.markdown(metrics))
    if not arguments.dry_run:
        write(arguments.bundle, calibration, metrics, arguments.work)
    print(f"bias study: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
