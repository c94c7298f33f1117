"""Gender bias of the towers: how gendered an embedding is, what ablating features does to it, and how to tell.

`gender_scores` and `FeatureAblation` are the definition; `audit` says what an ablation did to labelled items, with
paired intervals, recalibrated thresholds, a matched null and a retrained probe.

Source: "Multi-Faceted Multimodal Monosemanticity" (arXiv 2502.14888) for the ablation; the controls are ours.
"""

from services.bias.ablation import Ablator, FeatureAblation, Mode, Side, kept
from services.bias.association import Association, associate, rank_by_association
from services.bias.audit import Audit, AuditSettings, Verdict, audit
from services.bias.calibration import BiasCalibration, DictionaryCalibration, ModalityCalibration
from services.bias.cases import MAN, UNGENDERED, WOMAN, Cases
from services.bias.gender import gender_direction, gender_scores, probability
from services.bias.leace import Leace
from services.bias.measures import Change, Estimate
from services.bias.null import matched_sets
from services.bias.plan import Plan
from services.bias.probe import probe_scores

__all__ = [
    "MAN",
    "UNGENDERED",
    "WOMAN",
    "Ablator",
    "Association",
    "Audit",
    "AuditSettings",
    "BiasCalibration",
    "Cases",
    "Change",
    "DictionaryCalibration",
    "Estimate",
    "FeatureAblation",
    "Leace",
    "ModalityCalibration",
    "Mode",
    "Plan",
    "Side",
    "Verdict",
    "associate",
    "audit",
    "gender_direction",
    "gender_scores",
    "kept",
    "matched_sets",
    "probability",
    "probe_scores",
    "rank_by_association",
]
