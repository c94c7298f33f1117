"""The study's figures as tables, for the terminal, the documentation and the bundle's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from training.report.tables import FigureTable, as_markdown

# Where the figures of the documentation begin and end.
BEGIN, END = "<!-- figures: written by the defence study -->", "<!-- end of figures -->"
LOOKS = ("one look", "two looks")


def cell(figure: Mapping[str, Any]) -> str:
    """Return "0.93 [0.90, 0.96]" of a figure with its interval."""
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> FigureTable:
    """Return a table; `tables` gives it its title."""
    return FigureTable(title, header, list(rows))


def summary(metrics: Mapping[str, Any]) -> str:
    """Return what the figures were measured on."""
    samples, settings = metrics["samples"], metrics["settings"]
    return (
        f"{samples['evaluation_attacked']} attacked and {samples['evaluation_clean']} clean validation drawings, none "
        f"of whose concepts the detector was calibrated on ({samples['calibration_attacked']} attacked in 9 ways, "
        f"{samples['calibration_clean']} clean pictures); accuracy is among {samples['labels']} labels; "
        f"{settings['steps']} gradients an attack. Brackets are 95% intervals, of accuracy by concept."
    )


def tables(metrics: Mapping[str, Any]) -> list[FigureTable]:
    """Return every table of the study."""
    rate = metrics["settings"]["false_positive_rate"]
    titled = {
        "Detection: attack and epsilon left out of calibration": detection(metrics["detection"]),
        "What each score tells alone (AUROC)": single(metrics["single_scores"]),
        "Clean pictures called adversarial": false_positives(metrics["false_positives"]),
        f"Accuracy at {rate:.0%} false positives": robustness(metrics["robustness"]),
        "Targeted attacks: share taken for the target": targeted(metrics["targeted"]),
        "Other defences (accuracy)": baselines(metrics["baselines"]),
        "The attacker who knows the defence": adaptive(metrics["adaptive"]),
    }
    if "openmoji" in metrics:
        titled["openmoji, an artist that nothing was made from"] = openmoji(metrics["openmoji"])
    return [replace(found, title=title) for title, found in titled.items()]


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return every table as Markdown."""
    return as_markdown(summary(metrics), tables(metrics))


def put_into(page: str, metrics: Mapping[str, Any]) -> str:
    """Return a documentation page with its figures, between the two marks, replaced by these.

    Raises
    ------
    ValueError
        Where the page has not both marks, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown(metrics)}\n{END}{after}"


def detection(metrics: Mapping[str, Any]) -> FigureTable:
    """Write AUROC and TPR of both detectors, by attack."""
    header = [
        "attack",
        *(f"{look}: {what}" for look in LOOKS for what in ("AUROC", "TPR at 1% FPR", "at 5%")),
    ]
    rows = []
    for attack, row in metrics.items():
        cells = [attack]
        for look in LOOKS:
            found = row[look]
            cells += [cell(found["auroc"]), cell(found["detected"]["1%"]), cell(found["detected"]["5%"])]
        rows.append(cells)
    return table(header, rows)


def single(metrics: Mapping[str, Any]) -> FigureTable:
    """Write the AUROC of each score, by attack."""
    names = list(next(iter(metrics.values())))
    return table(
        ["attack", *(f"r{k}: {name.replace('_', ' ')}" for k, name in enumerate(names, 1))],
        [[attack, *(f"{row[name]['value']:.2f}" for name in names)] for attack, row in metrics.items()],
    )


def false_positives(metrics: Mapping[str, Any]) -> FigureTable:
    """Write false positive rates, by harmless change."""
    header = ["picture", *(f"{look}, at {rate}" for look in LOOKS for rate in ("1%", "5%"))]
    return table(
        header,
        [
            [name, *(cell(row[look][rate]) for look in LOOKS for rate in ("1%", "5%"))]
            for name, row in metrics.items()
        ],
    )


def robustness(metrics: Mapping[str, Any]) -> FigureTable:
    """Write accuracy before and after, by attack."""
    columns = ("accuracy", "filter_all", "flagged", "flagged_or_right")
    header = [
        "pictures",
        "no defence",
        *(f"{look}: {c.replace('_', ' ')}" for look in LOOKS for c in columns),
    ]
    return table(
        header,
        [
            [name, cell(row["undefended"]), *(cell(row[look][c]) for look in LOOKS for c in columns)]
            for name, row in metrics.items()
        ],
    )


def targeted(metrics: Mapping[str, Any]) -> FigureTable:
    """Write the success of targeted attacks, before and after."""
    header = [
        "attack",
        "unattacked",
        "before",
        *(f"{look}: {w}" for look in LOOKS for w in ("after", "unflagged")),
    ]
    return table(
        header,
        [
            [
                name,
                cell(row["clean"]),
                cell(row["before"]),
                *(cell(row[look][what]) for look in LOOKS for what in ("after", "unflagged")),
            ]
            for name, row in metrics.items()
        ],
    )


def baselines(metrics: Mapping[str, Any]) -> FigureTable:
    """Write the accuracy of each defence."""
    names = list(next(iter(metrics.values())))
    return table(
        ["defence", *names],
        [[defense, *(cell(row[name]) for name in names)] for defense, row in metrics.items()],
    )


def adaptive(metrics: Mapping[str, Any]) -> FigureTable:
    """Write what is left under the adaptive attack."""
    columns = {
        "undefended": "unattacked accuracy",
        "accuracy": "accuracy",
        "flagged": "flagged",
        "evades": "wrong and not flagged",
        "auroc": "AUROC",
    }
    return table(
        ["defence", "epsilon", *columns.values()],
        [
            [look, epsilon, *(cell(row[name]) for name in columns)]
            for look, rows in metrics.items()
            for epsilon, row in rows.items()
        ],
    )


def openmoji(metrics: Mapping[str, Any]) -> FigureTable:
    """Write the figures of the test artist."""
    rows = [
        [
            look,
            cell(row["auroc"]),
            cell(row["detected"]["1%"]),
            cell(row["false_positives"]["1%"]),
            cell(row["false_positives"]["5%"]),
            cell(row["clean_accuracy"]),
            cell(row["accuracy"]),
        ]
        for look, row in metrics.items()
        if look in LOOKS
    ]
    rows.append(["none", "", "", "", "", cell(metrics["undefended_clean"]), cell(metrics["undefended"])])
    header = [
        f"PGD 4/255 on {metrics['images']} drawings", "AUROC", "TPR at 1%", "FPR at 1%", "FPR at 5%",
        "clean accuracy", "accuracy",
    ]  # fmt: skip
    return table(header, rows)
