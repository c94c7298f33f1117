"""Write the bundle's own report: one page, no scripts, nothing loaded from elsewhere.

``python -m training.report.page`` reads the figures of the earlier steps from ``work/`` and writes
``work/report.html``.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from services.bundle.load import refresh_manifest
from services.modality.label_reasons import label_reason
from services.modality.tables import Cards, ModalityTable, read_thumbnails
from training.bias import plots as bias_plots
from training.bias import tables as bias_tables
from training.build.embedded import WORK
from training.defense.tables import summary, tables
from training.report.generation import generation_section
from training.report.plots import label_bars, mds_histograms, monosemanticity_curves

BENCH = Path("out/bench")
TEMPLATE = "page.html.j2"
# Cards on the page, by label.
CARDS_SHOWN = {"CROSS": 24, "IMAGE": 12, "TEXT": 12}
MAX_BYTES = 3_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file, or nothing where the step was not run."""
    return json.loads(path.read_text()) if path.exists() else {}


def retrieval_rows(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of the retrieval table of one set of drawings: a label and recall by k."""
    towers = metrics["towers"]
    rows = [("image to caption", towers["image_to_text"])]
    if "strict" in metrics:
        rows.append(("the same, no sibling drawing trained on", metrics["strict"]["image_to_text"]))
    rows.append(("caption to image", towers["text_to_image"]))
    rows.append(("nearest neighbour on pixels", metrics["pixels"]))
    rows.append(("nearest neighbour on colours", metrics["colours"]))
    return rows


def pick_features(table: ModalityTable) -> dict[str, np.ndarray]:
    """Return features worth showing by label: those whose name holds best on held-out samples, no name twice."""
    score = np.nan_to_num(table.name_npmi, nan=-1.0) * np.nan_to_num(table.name_auc, nan=0.0)
    chosen: dict[str, np.ndarray] = {}
    for label, count in CARDS_SHOWN.items():
        order = [int(j) for j in np.argsort(-score) if table.label[j] == label]
        first = {str(table.name[j]): j for j in reversed(order) if table.name[j]}
        named = sorted(set(first.values()), key=order.index)
        chosen[label] = np.array((named + [j for j in order if j not in set(named)])[:count], dtype=np.int64)
    return chosen


def feature_cards(table: ModalityTable, cards: Cards) -> dict[str, list[dict[str, Any]]]:
    """Return what the page shows of each chosen feature."""
    return {
        label: [
            {
                **table.row(int(feature)),
                "reason": label_reason(table.row(int(feature))),
                "images": [
                    {"uri": data_uri(sample.thumbnail), "text": sample.text}
                    for sample in cards.top(int(feature), "image", 5)
                    if sample.thumbnail
                ],
                "texts": [sample.text for sample in cards.top(int(feature), "text", 3)],
            }
            for feature in features
        ]
        for label, features in pick_features(table).items()
    }


def data_uri(webp: bytes) -> str:
    """Return an image as an address that holds it."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def interval(value: dict[str, Any] | None, digits: int = 3) -> str:
    """Return a figure with its interval."""
    if not value:
        return "-"
    middle = value.get("value", value.get("mean", value.get("kappa")))
    if middle is None:
        return "-"
    return f"{middle:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def defense_section(work: Path) -> dict[str, Any] | None:
    """Return the tables of the defence's study; None where it was not run."""
    metrics = read_json(work / "defense.json")
    return {"summary": summary(metrics), "tables": tables(metrics)} if metrics else None


def bias_section(work: Path, parts: Mapping[str, str] = bias_tables.PARTS) -> dict[str, Any] | None:
    """Return the tables and plots of the bias study; None where it was not run. `parts` are titles."""
    metrics = read_json(work / "bias.json")
    if not metrics:
        return None
    shown = "test" if "test" in metrics else "validation"
    audits = metrics[shown]["audits"]
    title = f"{metrics['chosen']}: {parts[shown]}"
    plots = (
        bias_plots.professions(audits[0], title),
        bias_plots.nulls(audits),
        bias_plots.threshold(audits[0]),
    )
    return {
        "summary": bias_tables.summary(metrics, parts),
        "tables": bias_tables.tables(metrics, parts),
        "plots": "".join(f"<section>{plot}</section>" for plot in plots if plot),
    }


def environment(*folders: Path) -> Environment:
    """Return what fills the templates of `folders` and of this one."""
    folders = (*folders, Path(__file__).parent)
    made = Environment(loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined)
    made.filters |= {"interval": interval, "number": bias_tables.number}
    return made


def render(work: Path, bench: Path = BENCH) -> str:
    """Return the page; `bench` holds what the benchmarks of generated pictures wrote, if they ran."""
    dictionaries, modality = read_json(work / "dictionaries.json"), read_json(work / "modality.json")
    default = dictionaries["default"]
    table = ModalityTable.read(work / "modality" / f"{default}.parquet")
    cards = Cards.read(
        work / "cards" / f"{default}.parquet", read_thumbnails(work / "cards" / "images.parquet")
    )
    retrieval = read_json(work / "retrieval.json")
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            retrieval={part: retrieval[part] for part in ("validation", "test") if part in retrieval},
            retrieval_rows=retrieval_rows,
            dictionaries=dictionaries,
            modality=modality,
            default=default,
            generation=generation_section(bench),
            bias=bias_section(work),
            defense=defense_section(work),
            cards=feature_cards(table, cards),
            grid=read_json(work / "dictionary_grid.json"),
            plots={
                "mds": mds_histograms(modality),
                "labels": label_bars(modality),
                "monosemanticity": monosemanticity_curves(modality),
            },
        )
    )


def main() -> None:
    """Write the report from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--bench", type=Path, default=BENCH, help="figures and sheets of generated pictures")
    parser.add_argument("--bundle", type=Path, help="put the page into this bundle, and renew its manifest")
    arguments = parser.parse_args()
    page = render(arguments.work, arguments.bench)
    if len(page.encode()) > MAX_BYTES:
        raise SystemExit(f"the report has {len(page.encode())} bytes, more than {MAX_BYTES}")
    (arguments.work / "report.html").write_text(page, encoding="utf-8")
    if arguments.bundle is not None:
        shutil.copyfile(arguments.work / "report.html", arguments.bundle / "report.html")
        refresh_manifest(arguments.bundle)
    print(f"{arguments.work / 'report.html'}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
