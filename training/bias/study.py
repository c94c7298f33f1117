"""Measure gender bias of the bundle's towers, and what ablating features does about it.

``python -m training.bias_study --bundle bundles/emoji --corpus work/corpus`` fits on the training artists' drawings,
chooses on their held-out pairs, writes the bundle's ``bias/`` section with its manifest and report, ``work/bias.json``
with every figure, and prints the tables. ``--test`` adds openmoji, once, at the end. No tower is run: embeddings are
read.

The ablation that is reported is, among those that keep 95% of the retrieval of drawings that show no people, the one
whose audit on held-out drawings has the strongest verdict, then the fewest harms; then the one after which a classifier
that is trained anew tells the genders least, on drawings and texts. Where that can be trained on drawings or on texts
only, theirs alone count; where on neither, the AUC nearest to 0.5. The figures say which it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.bias.ablation import Side
from services.bias.associate import associate
from services.bias.association import Association, rank_by_association
from services.bias.audit import Audit, AuditSettings, Verdict, audit, audit_scores
from services.bias.calibration import BiasCalibration, DictionaryCalibration, ModalityCalibration
from services.bias.cases import UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_scores
from services.bias.leace import Leace
from services.bias.measures import Labels, best_threshold
from services.bundle.load import BIAS, Bundle, refresh_manifest
from services.dictionaries import Dictionary
from services.errors import NotEnoughItems
from services.modality.modalities import Modality
from services.modality.tables import Label
from training.bias import tables
from training.bias.counterparts import subspace
from training.bias.data import StudyData, codes
from training.bias.measure import Utility, by_artist, by_profession, quick
from training.bias.methods import LABELS, Method, feature_methods, reference_methods
from training.build.assemble import without_nan
from training.build_bundle import DEFAULT_OUT
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.report import render
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.pairs import TEMPLATES

KEEP = 0.95
# What the bundle's section holds of the figures.
KEPT_FIGURES = ("dictionary", "chosen", "chosen_by", "candidates", "thresholds", "labels")
FIT = ("fit", "pool")
TRAINING_ARTISTS = (*FIT, "validation")
MIN_GROUP = 5
SIDES = ("image", "text")
# What may choose, the first that is defined, and its value where no gender is left.
AIMS = {"probe": 0.5, "auc": 0.5}
# The weakest first.
STRENGTH = (
    Verdict.NO_EFFECT, Verdict.THRESHOLD_ONLY, Verdict.NOT_SPECIFIC, Verdict.SILENCED, Verdict.EFFECT,
)  # fmt: skip
# Audited in full beside the chosen one.
ALWAYS = (*(f"label {label.value}, zero" for label in LABELS), "LEACE", "counterparts 1", "round trip")


class Study:
    """One run on one bundle.

    Parameters
    ----------
    bundle : Bundle
        Verified.
    data : StudyData
        Of its towers.
    settings : AuditSettings
        Of the full audits.
    dictionary : str
        Name of the dictionary whose features are ablated; empty for the default.
    """

    def __init__(
        self, bundle: Bundle, data: StudyData, settings: AuditSettings, dictionary: str = ""
    ) -> None:
        self.bundle, self.data, self.settings = bundle, data, settings
        self.name = bundle.resolve(dictionary)
        self.dictionary = bundle.dictionary(self.name)
        self.fitted = self._fitted()
        self.leace = {m: Leace.fit(e, woman) for m, (e, woman, _) in self.fitted.items()}
        self.text_cases = data.texts(self.dictionary)

    def _fitted(self) -> dict[Modality, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Embeddings, "is a woman" and cluster of the gendered items that associations and erasers are fitted on."""
        data = self.data
        index = data.people(*FIT)
        images = data.drawings(self.dictionary, index)
        texts = data.texts(self.dictionary)
        texts = texts.take(texts.gender != UNGENDERED)
        return {
            m: (cases.e, cases.gender == WOMAN, cases.cluster)
            for m, cases in ((Modality.IMAGE, images), (Modality.TEXT, texts))
        }

    def counterparts(self) -> dict[Modality, np.ndarray]:
        """Return the gender subspace of the drawings and texts that things are fitted on, by modality."""
        subjects = {
            Modality.IMAGE: self.data.subjects(self.data.people(*FIT)),
            # A text's activity is all that counterparts share.
            Modality.TEXT: self.data.text_subjects(),
        }
        return {m: subspace(e, woman, subjects[m]) for m, (e, woman, _) in self.fitted.items()}

    def associations(self, dictionary: Dictionary) -> dict[Modality, Association]:
        """Return how each feature of a dictionary goes with gender, by modality."""
        found = {}
        for modality, (e, woman, cluster) in self.fitted.items():
            z = codes(dictionary, e, modality)
            contribution = dictionary.decoder_rows(modality).numpy() @ self.data.direction
            scores = gender_scores(e, self.data.direction)
            gap = float(scores[woman].mean() - scores[~woman].mean())
            found[modality] = associate(z, woman, cluster, contribution, gap)
        return found

    def calibrate(self, dictionary: Dictionary) -> DictionaryCalibration:
        """Return what the bundle keeps of one dictionary."""
        found = self.associations(dictionary)
        embeddings = self.data.embeddings
        fitted = embeddings.where(*FIT)
        captions = np.unique(embeddings.caption[fitted])
        corpus = {
            Modality.IMAGE: embeddings.images[fitted],
            Modality.TEXT: embeddings.texts[:, captions].reshape(-1, embeddings.texts.shape[-1]),
        }
        sides = {}
        for modality, e in corpus.items():
            means = np.asarray(codes(dictionary, e, modality).mean(axis=0)).ravel().astype(np.float32)
            sides[modality] = ModalityCalibration(means, found[modality])
        return DictionaryCalibration(rank_by_association(list(found.values())).astype(np.int32), sides)

    def sides(self, known: DictionaryCalibration) -> dict[Modality, Side]:
        """Return the dictionary under study in both modalities."""
        return {m: Side(self.dictionary.decoder_rows(m).numpy(), known.sides[m].means) for m in Modality}

    def cases(self, part: str) -> Cases:
        """Return a part's gendered people with ungendered professions: by the training artists, or by openmoji."""
        data = self.data
        ungendered = data.ungendered_professions(*(TRAINING_ARTISTS if part == "validation" else (part,)))
        return data.drawings(self.dictionary, np.concatenate([data.people(part), ungendered]))

    def threshold(self, cases: Cases) -> float:
        """Return the threshold of the best balanced accuracy."""
        labels = Labels(cases.gender, np.full(len(cases), -1), 0, MIN_GROUP)
        scores = gender_scores(cases.e, self.data.direction)
        return float(best_threshold(scores, labels, np.ones((1, len(cases))))[0])

    def compare(self, methods: list[Method], cases: Cases, utility: Utility) -> list[dict[str, Any]]:
        """Return the quick figures of every method, and of none, on drawings and on texts."""
        base = utility.r1()
        rows = [self._row("nothing", 0, cases.e, self.text_cases.e, cases, 1.0)]
        for method in methods:
            plan = method.plan
            row = self._row(
                method.name, method.features, plan.apply(cases), plan.apply(self.text_cases), cases,
                utility.r1(plan) / max(base, 1e-9),
            )  # fmt: skip
            rows.append(row)
        return rows

    def _row(
        self, name: str, features: int, after: np.ndarray, after_text: np.ndarray, cases: Cases, kept: float
    ) -> dict[str, Any]:
        direction, scale = self.data.direction, self.settings.logit_scale
        return {
            "method": name,
            "features": features,
            "r1_kept": round(kept, 4),
            "image": quick(cases, after, direction, scale, MIN_GROUP),
            "text": quick(self.text_cases, after_text, direction, scale, MIN_GROUP),
        }

    def full(self, method: Method, sides: dict[Modality, Side], cases: Cases) -> dict[str, Any]:
        """Return the whole audit of one method."""
        found = audit(cases, self.data.direction, sides, method.plan, self.settings)
        return {"method": method.name, "features": method.features, **audit_figures(found)}


@dataclass(frozen=True)
class Choice:
    """The ablation that is reported.

    Attributes
    ----------
    method : str
        Its name.
    figure : str
        What chose it among those of the strongest verdict: one of `AIMS`, or "r1_kept" where no ablation keeps enough.
    sides : tuple of str
        "image" and "text", or the one of them on which the figure is defined; none for "r1_kept".
    """

    method: str
    figure: str
    sides: tuple[str, ...]


def enough_kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the feature ablations that keep enough of the retrieval of drawings that show no people."""
    return [row for row in rows if row["features"] and row["r1_kept"] >= KEEP]


def choose(rows: list[dict[str, Any]], audits: Mapping[str, Mapping[str, Any]]) -> Choice:
    """Return the feature ablation of the rule in this module's docstring; the least loss where none keeps enough.

    Parameters
    ----------
    rows
        Quick figures of all methods.
    audits
        By name, "verdict" and "harms" of those that keep enough.

    Raises
    ------
    NotEnoughItems
        Where no figure that could choose is defined.
    """
    enough = enough_kept(rows)
    if not enough:
        ablations = [row for row in rows if row["features"]]
        return Choice(max(ablations, key=lambda row: row["r1_kept"])["method"], "r1_kept", ())
    figure, sides = criterion(enough)

    def rank(row: dict[str, Any]) -> tuple[int, int, float]:
        found = audits[row["method"]]
        strength = STRENGTH.index(Verdict(found["verdict"]))
        return -strength, len(found["harms"]), distance(row, figure, sides)

    return Choice(min(enough, key=rank)["method"], figure, sides)


def criterion(rows: list[dict[str, Any]]) -> tuple[str, tuple[str, ...]]:
    """Return the first of `AIMS` that every row has on some side, and those sides."""
    for figure in AIMS:
        # The smallest of NaNs is the first, whatever it is.
        sides = tuple(side for side in SIDES if not any(math.isnan(row[side][figure]) for row in rows))
        if sides:
            return figure, sides
    raise NotEnoughItems(f"no ablation can be chosen: none of {', '.join(AIMS)} is defined")


def distance(row: dict[str, Any], figure: str, sides: Sequence[str]) -> float:
    """Return how far a figure is from where no gender is left, summed over sides."""
    return float(sum(abs(row[side][figure] - AIMS[figure]) for side in sides))


def audit_figures(found: Audit) -> dict[str, Any]:
    """Return an audit as JSON values; of the null its quantiles, not its draws."""
    return {
        "verdict": found.verdict.value,
        "harms": list(found.harms),
        "auc": asdict(found.auc),
        "raw": {name: asdict(change) for name, change in found.raw.items()},
        "recalibrated": {name: asdict(change) for name, change in found.recalibrated.items()},
        "thresholds": [found.threshold_before, found.threshold_after],
        "nulls": [
            {
                "measure": test.measure,
                "observed": test.observed,
                "p": test.p,
                "null": np.nanquantile(test.null, [0, 0.025, 0.25, 0.5, 0.75, 0.975, 1]).tolist(),
            }
            for test in found.nulls
        ],
        "null_energy_ratio": found.null_energy_ratio,
        "probe": asdict(found.probe),
        "kept": found.kept,
        "neighbours_kept": found.neighbours_kept,
        "curve": found.curve[::5].round(4).tolist(),
        "professions": [
            {
                "profession": p.name,
                "women": p.women,
                "men": p.men,
                "ungendered": p.ungendered,
                "accuracy": asdict(p.accuracy),
                "auc": asdict(p.auc),
                "p_woman": asdict(p.p_woman),
            }
            for p in found.professions
        ],
    }


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
    figures: dict[str, Any] = {
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
        figures["test"] = {"methods": study.compare(reported, parts["test"], utility)}
    for part, cases in {**parts, "texts": study.text_cases}.items():
        started = time.monotonic()
        figures[part]["counts"] = counts(cases)
        figures[part]["audits"] = [study.full(method, sides, cases) for method in full]
        shift = gender_scores(cases.e, data.direction)
        moved = audit_scores(cases, shift, shift - shift[cases.gender != UNGENDERED].mean(), study.settings)
        figures[part]["audits"].append({"method": "threshold shift", "features": 0, **audit_figures(moved)})
        tell(f"{part}: {len(full)} audits in {time.monotonic() - started:.0f} s")
    figures |= _professions(study, by_name[chosen], figures, test)
    calibration = BiasCalibration(
        tower_fingerprint=bundle.manifest.clip.fingerprint,
        prompts={who: tuple(template.format(who) for template in TEMPLATES) for who in ("woman", "man")},
        direction=data.direction,
        thresholds=thresholds,
        leace=study.leace,
        dictionaries=known,
        figures=without_nan({key: figures[key] for key in KEPT_FIGURES}),
    )
    return calibration, without_nan(figures)


def _professions(study: Study, chosen: Method, figures: dict[str, Any], test: bool) -> dict[str, Any]:
    """Ungendered professions by artist and era, and by profession from drawings and from texts."""
    data, scale = study.data, study.settings.logit_scale
    index = data.ungendered_professions(*TRAINING_ARTISTS, *(("test",) if test else ()))
    cases = data.drawings(study.dictionary, index)
    after = chosen.plan.apply(cases)
    thresholds = tuple(figures["validation"]["audits"][0]["thresholds"])
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


def write(bundle: Path, calibration: BiasCalibration, figures: dict[str, Any], work: Path) -> None:
    """Write the figures, the bundle's section and its report, and vouch for the bundle anew."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "bias.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    (work / "bias.md").write_text(tables.markdown(figures))
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
    calibration, figures = run(Study(bundle, data, settings, arguments.dictionary), arguments.test)
    print(tables.markdown(figures))
    if not arguments.dry_run:
        write(arguments.bundle, calibration, figures, arguments.work)
    print(f"bias study: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
