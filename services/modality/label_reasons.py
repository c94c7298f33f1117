"""Why a feature has its label, in a sentence. The gateway writes it on cards: numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.modality.tables import Label

# Half the width of the band around one half that counts as both, where nobody says otherwise.
DELTA = 0.25


def label_reason(row: Mapping[str, Any], delta: float = DELTA) -> str:
    """Return why a feature has its label, such as "78% of its energy comes from pictures [71%, 84%]".

    Parameters
    ----------
    row : mapping
        Of `services.modality.tables.ModalityTable.row`.
    delta : float
        With which the table was made.

    Returns
    -------
    str
        A sentence without a full stop.
    """
    label = Label(row["label"])
    if label is Label.DEAD:
        return "nothing that it was scored on activates it"
    mds, low, high = (row[name] for name in ("mds_energy", "mds_energy_low", "mds_energy_high"))
    pictures = f"{mds:.0%} of its energy comes from pictures [{low:.0%}, {high:.0%}]"
    if label is Label.IMAGE:
        return pictures
    if label is Label.TEXT:
        return f"{1 - mds:.0%} of its energy comes from texts [{1 - high:.0%}, {1 - low:.0%}]"
    together = f"a correlation of {row['coactivation']:.2f} (q = {row['coactivation_q']:.2g})"
    if label is Label.CROSS:
        return f"{pictures}, and both sides of a pair fire together, with {together}"
    below, above = 0.5 - delta, 0.5 + delta
    inside = low >= below and high <= above
    if low > above or high < below or (inside and row["coactivation_significant"]):
        return f"{pictures}, but too few independent pairs activate it ({row['paper_pairs']} pairs in all)"
    if inside:
        found = f": {together}" if row["coactivation"] == row["coactivation"] else ""
        return f"{pictures}, but both sides of a pair do not fire together more than by chance{found}"
    bounds = " and ".join(f"{bound:.0%}" for bound in (below, above) if low <= bound <= high)
    return f"{pictures}: the interval holds {bounds}, where labels change"
