"""What the bias study works with: the fitted drawings and texts of a bundle, and the figures of one ablation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from services.bias.ablation import Side
from services.bias.associate import Association, associate, rank_by_association
from services.bias.audit import Audit, AuditSettings, audit
from services.bias.calibration import DictionaryCalibration, ModalityCalibration
from services.bias.cases import UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_scores
from services.bias.leace import Leace
from services.bias.measures import Labels, best_threshold
from services.bundle.load import Bundle
from services.dictionaries import Dictionary
from services.modality.modalities import Modality
from training.bias.counterparts import subspace
from training.bias.data import StudyData, codes
from training.bias.measure import Utility, quick
from training.bias.methods import Method

FIT = ("fit", "pool")
TRAINING_ARTISTS = (*FIT, "validation")
MIN_GROUP = 5


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
        return {"method": method.name, "features": method.features, **audit_metrics(found)}


def audit_metrics(found: Audit) -> dict[str, Any]:
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
