"""One input's features against a modality table, as the contract's message."""

from __future__ import annotations

import numpy as np
from monofacet.v1 import common_pb2
from monofacet.v1 import modality_service_pb2 as pb

from deployments.encoder.tasks import Features
from deployments.gateway.cards import LABELS, label_value
from services.modality.energy import energy_share
from services.modality.tables import ModalityTable


def classify(features: Features, table: ModalityTable, top: int) -> pb.ModalityClassification:
    """Say how the energy of one input is spread over the labels.

    Parameters
    ----------
    features
        Every active feature of the input.
    table
        Labels and names of the dictionary's features.
    top
        Features to list, strongest first.
    """
    labels = table.label[features.indices]
    share, by_label = energy_share(features.values, labels)
    strongest = np.argsort(-share, kind="stable")[:top]
    return pb.ModalityClassification(
        shares=[pb.LabelShare(label=label_value(label), share=by_label[label]) for label in LABELS],
        dominant_label=label_value(max(LABELS, key=lambda label: by_label[label]))
        if share.any()
        else common_pb2.MODALITY_LABEL_UNSPECIFIED,
        top_features=[
            pb.ActiveFeature(
                feature=int(features.indices[i]),
                activation=float(features.values[i]),
                share=float(share[i]),
                label=label_value(str(labels[i])),
                name=str(table.name[features.indices[i]]),
            )
            for i in strongest
        ],
        active_features=len(features.indices),
    )
