"""The quick figures by which an ablation is chosen, and the table of ungendered professions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from services.bias.cases import UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_scores, probability
from services.bias.linear_probe import probe_scores
from services.bias.measures import Labels, best_threshold, restored_scale, threshold_metrics, weighted_auc
from services.bias.plan import Plan
from services.modality.modalities import Modality
from training.bias.data import ERAS, StudyData, codes
from training.towers.retrieval import ranks, recall

# Before and after as the audit rounds them; figures of a page need no more.
DIGITS = 4


@dataclass(frozen=True)
class Utility:
    """Retrieval of drawings that show no people: what an ablation should leave alone.

    Attributes
    ----------
    cases : Cases
        The drawings.
    captions, texts, text_captions
        As for `training.towers.retrieval.ranks`; the texts are not ablated.
    """

    cases: Cases
    captions: np.ndarray
    texts: np.ndarray
    text_captions: np.ndarray

    @classmethod
    def of(cls, data: StudyData, dictionary: Any, part: str) -> Utility:
        """Collect the drawings of a part; every caption of a thing in it is a candidate."""
        index = data.things(part)
        distinct = np.unique(data.embeddings.caption[index])
        e = data.embeddings.images[index]
        cases = Cases(
            e,
            codes(dictionary, e, Modality.IMAGE),
            np.zeros(len(index), bool),
            np.full(len(index), UNGENDERED),
            np.full(len(index), ""),
            np.arange(len(index)),
        )
        captions = data.embeddings.captions
        return cls(
            cases, captions[data.embeddings.caption[index]], data.embeddings.mean_texts()[distinct],
            captions[distinct],
        )  # fmt: skip

    def r1(self, plan: Plan | None = None) -> float:
        """Return R@1 from drawing to caption after an ablation of the drawings."""
        e = self.cases.e if plan is None else plan.apply(self.cases)
        return float(recall(ranks(e, self.texts, self.captions, self.text_captions), 1).mean())


def quick(
    cases: Cases, after: np.ndarray, direction: np.ndarray, logit_scale: float, min_group: int
) -> dict[str, float]:
    """Return AUC, skew at 0 and at the recalibrated threshold, worst group and probe, without intervals."""
    _, codes_ = cases.groups()
    labels = Labels(cases.gender, codes_, int(codes_.max(initial=-1)) + 1, min_group)
    scores, ones = gender_scores(after, direction), np.ones((1, len(cases)))
    gendered = cases.gender != UNGENDERED
    raw = threshold_metrics(scores, labels, ones, np.zeros(1), logit_scale)
    threshold = best_threshold(scores, labels, ones)
    scale = restored_scale(gender_scores(cases.e, direction), scores, labels, ones, logit_scale)
    again = threshold_metrics(scores, labels, ones, threshold, scale)
    margins = probe_scores(after[gendered], cases.gender[gendered] == WOMAN, cases.cluster[gendered])
    probe_labels = Labels(cases.gender[gendered], np.full(int(gendered.sum()), -1), 0, min_group)
    # NaN is not above 0: without this, items that no fold could tell would all be called men.
    decided = ones[:, gendered] * ~np.isnan(margins)
    probe = threshold_metrics(margins, probe_labels, decided, np.zeros(1), logit_scale)
    metrics = {
        "auc": weighted_auc(scores[gendered], labels.woman[gendered], ones[:, gendered])[0],
        "skew": raw["skew"][0],
        "skew_recalibrated": again["skew"][0],
        "gender_gap": raw["gender_gap"][0],
        "worst_group": again["worst_group_accuracy"][0],
        "probe": probe["balanced_accuracy"][0],
    }
    return {name: round(float(value), DIGITS) for name, value in metrics.items()}


def by_artist(
    data: StudyData,
    index: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    logit_scale: float,
    thresholds: tuple[float, float],
) -> list[dict[str, Any]]:
    """Return P(woman) of ungendered professions by artist, before and after, at recalibrated thresholds."""
    rows = []
    artists = data.columns["set"][index]
    for artist in np.unique(artists):
        chosen = artists == artist
        p = [
            probability(scores[chosen], logit_scale, threshold)
            for scores, threshold in zip((before, after), thresholds, strict=True)
        ]
        rows.append(
            {
                "artist": ERAS.get(str(artist), str(artist)),
                "drawings": int(chosen.sum()),
                "p_woman_before": round(float(p[0].mean()), DIGITS),
                "p_woman_after": round(float(p[1].mean()), DIGITS),
                "skew_before": round(float(np.abs(p[0] - 0.5).mean()), DIGITS),
                "skew_after": round(float(np.abs(p[1] - 0.5).mean()), DIGITS),
            }
        )
    return rows


def by_profession(
    cases: Cases, after: np.ndarray, direction: np.ndarray, logit_scale: float
) -> list[dict[str, Any]]:
    """Return P(woman) of each ungendered profession before and after, at the threshold 0."""
    rows = []
    before_p = probability(gender_scores(cases.e, direction), logit_scale)
    after_p = probability(gender_scores(after, direction), logit_scale)
    ungendered = cases.gender == UNGENDERED
    for profession in np.unique(cases.profession[ungendered & (cases.profession != "")]):
        chosen = ungendered & (cases.profession == profession)
        rows.append(
            {
                "profession": str(profession),
                "items": int(chosen.sum()),
                "p_woman_before": round(float(before_p[chosen].mean()), DIGITS),
                "p_woman_after": round(float(after_p[chosen].mean()), DIGITS),
            }
        )
    return rows
