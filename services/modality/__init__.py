"""Which modality a feature is about: scores, intervals, significance and labels.

`score_pairs` does all of it for activations over image-text pairs; the other functions are its parts, one
equation each.
"""

from services.modality.coactivation import benjamini_hochberg, coactivation, permutation_p_values
from services.modality.labels import (
    Agreement,
    cohen_kappa,
    label_agreement,
    label_features,
    paper_labels,
)
from services.modality.scores import (
    Activations,
    bootstrap_mds,
    energies,
    energy_mds,
    firing_rates,
    paper_mds,
    stack_rows,
)
from services.modality.table import ModalitySettings, score_pairs, split_half_agreement
from services.tables import Label

__all__ = [
    "Activations",
    "Agreement",
    "Label",
    "ModalitySettings",
    "benjamini_hochberg",
    "bootstrap_mds",
    "coactivation",
    "cohen_kappa",
    "energies",
    "energy_mds",
    "firing_rates",
    "label_agreement",
    "label_features",
    "paper_labels",
    "paper_mds",
    "permutation_p_values",
    "score_pairs",
    "split_half_agreement",
    "stack_rows",
]
