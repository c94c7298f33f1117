"""The report of a build: one page, no scripts, nothing loaded from elsewhere, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from services.modality.tables import Cards, ModalityTable, read_thumbnails
from training.report.page import bias_section, environment, feature_cards, read_json
from training.report.plots import label_bars, mds_histograms

TITLES = {
    "validation": "Validation pairs (choices were made on these)",
    "test": "Test pairs (reported only)",
    "texts": "Captions",
}


def render(work: Path, name: str, description: str, pairs: Mapping[str, Any], skips: Sequence[str]) -> str:
    """Return the page.

    Parameters
    ----------
    work : Path
        With the figures of the stages.
    name, description : str
        Of the bundle.
    pairs : mapping
        "counts" and "used": pairs by part; "skipped": bad rows.
    skips : sequence of str
        What was left out, and why.
    """
    dictionaries = read_json(work / "dictionaries.json")
    modality = read_json(work / "modality.json")
    default = dictionaries["default"]
    images = work / "cards" / "images.parquet"
    cards = Cards.read(
        work / "cards" / f"{default}.parquet", read_thumbnails(images) if images.exists() else {}
    )
    for summary in modality.values():
        # The templates take an undefined figure for a missing one.
        for key in ("kappa_halves", "kappa_seeds", "kappa_new_to_towers"):
            found = summary[key]
            summary[key] = found if found and found["low"] is not None else None
    # What a user's own matplotlibrc says would change the bytes.
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        return (
            environment(Path(__file__).parent)
            .get_template("report.html.j2")
            .render(
                name=name,
                description=description,
                **pairs,
                titles=TITLES,
                retrieval=read_json(work / "retrieval.json"),
                dictionaries=dictionaries,
                modality=modality,
                default=default,
                cards=feature_cards(ModalityTable.read(work / "modality" / f"{default}.parquet"), cards),
                plots={"mds": mds_histograms(modality), "labels": label_bars(modality)},
                bias=bias_section(work, TITLES),
                defense=read_json(work / "defense.json"),
                skips=skips,
            )
        )
