from __future__ import annotations

import numpy as np
import pytest

from services.modality.label_reasons import label_reason

ROW = {
    "label": "IMAGE",
    "mds_energy": 0.78,
    "mds_energy_low": 0.71,
    "mds_energy_high": 0.84,
    "coactivation": 0.4123,
    "coactivation_q": 0.0021,
    "coactivation_significant": True,
    "paper_pairs": 40,
}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mds_energy_low": 0.76}, "78% of its energy comes from pictures [76%, 84%]"),
        (
            {"label": "TEXT", "mds_energy": 0.1, "mds_energy_low": 0.06, "mds_energy_high": 0.18},
            "90% of its energy comes from texts [82%, 94%]",
        ),
        (
            {"label": "CROSS", "mds_energy": 0.5, "mds_energy_low": 0.4, "mds_energy_high": 0.6},
            "50% of its energy comes from pictures [40%, 60%], and both sides of a pair fire together, with a "
            "correlation of 0.41 (q = 0.0021)",
        ),
        (
            {"label": "UNRESOLVED"},
            "78% of its energy comes from pictures [71%, 84%]: the interval holds 75%, where labels change",
        ),
        (
            {"label": "UNRESOLVED", "mds_energy_low": 0.2},
            "78% of its energy comes from pictures [20%, 84%]: the interval holds 25% and 75%, where labels change",
        ),
        (
            {"label": "UNRESOLVED", "mds_energy_low": 0.76, "paper_pairs": 9},
            "78% of its energy comes from pictures [76%, 84%], but too few independent pairs activate it (9 pairs in "
            "all)",
        ),
        (
            {"label": "UNRESOLVED", "mds_energy": 0.5, "mds_energy_low": 0.4, "mds_energy_high": 0.6}
            | {"coactivation_significant": False, "coactivation": 0.02, "coactivation_q": 0.4},
            "50% of its energy comes from pictures [40%, 60%], but both sides of a pair do not fire together more than "
            "by chance: a correlation of 0.02 (q = 0.4)",
        ),
        (
            {"label": "DEAD", "mds_energy": np.nan, "mds_energy_low": np.nan, "mds_energy_high": np.nan},
            "nothing that it was scored on activates it",
        ),
    ],
)
def test_a_reason_says_which_rule_gave_the_label(changed, reason):
    assert label_reason(ROW | changed) == reason


def test_the_band_is_the_one_that_the_table_was_made_with():
    row = ROW | {"label": "UNRESOLVED", "mds_energy_low": 0.55, "mds_energy_high": 0.65, "mds_energy": 0.6}
    assert label_reason(row, delta=0.1).endswith("the interval holds 60%, where labels change")
