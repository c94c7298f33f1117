"""How the energy of one input is spread over what its features are about. The gateway computes it: numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.modality.tables import Label


def energy_share(
    values: NDArray[np.float32], labels: NDArray[np.str_]
) -> tuple[NDArray[np.float64], dict[Label, float]]:
    """Return the share of one input's energy on each of its active features, and on each label.

    share_l = sum_{j in l} z_j^2 / sum_j z_j^2. The normalisation of a modality cancels within one input.

    Parameters
    ----------
    values : float array, shape (a,)
        Activations of the features that are active.
    labels : str array, shape (a,)
        Their labels, values of `Label`.

    Returns
    -------
    float64 array, shape (a,)
        Shares of the features.
    dict of Label to float
        Shares of all labels. Both add up to 1, or are 0 for an input on which nothing fires.
    """
    energy = values.astype(np.float64) ** 2
    total = float(energy.sum())
    share = energy / total if total > 0 else energy
    return share, {label: float(share[labels == label.value].sum()) for label in Label}
