"""The study's figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PARTS = {
    "validation": "Held-out drawings of the training artists",
    "test": "openmoji, an artist never seen (reported only)",
    "texts": "Captions, in every template",
}
HEAD = ("method", "features", "R@1 kept", "AUC", "skew", "skew recal.", "gap", "worst group", "probe")


def markdown(figures: dict[str, Any]) -> str:
    """Return every table of the study."""
    parts = [f"Dictionary {figures['dictionary']}; chosen on validation: **{figures['chosen']}**."]
    for part in ("validation", "test"):
        if part in figures:
            parts.append(f"### {PARTS[part]}")
            parts.append(methods_table(figures[part]["methods"], "image"))
    parts += ["### Captions", methods_table(figures["validation"]["methods"], "text")]
    for part, title in PARTS.items():
        if part in figures:
            parts += [f"### Audits: {title}", audits_table(figures[part]["audits"])]
    parts += ["### What each label holds of gender", labels_table(figures["labels"])]
    parts += ["### Ungendered professions by artist", rows_table(figures["by_artist"])]
    for modality, rows in figures["by_profession"].items():
        parts += [f"### Ungendered professions, {modality}", rows_table(rows)]
    return "\n\n".join(parts) + "\n"


def methods_table(rows: Sequence[dict[str, Any]], side: str) -> str:
    """Return the comparison of all methods, on drawings ("image") or captions ("text")."""
    names = ("auc", "skew", "skew_recalibrated", "gender_gap", "worst_group", "probe")
    body = [
        [row["method"], str(row["features"] or ""), number(row["r1_kept"], 2)]
        + [number(row[side][name]) for name in names]
        for row in rows
    ]
    return grid(HEAD, body)


def audits_table(audits: Sequence[dict[str, Any]]) -> str:
    """Return the audits: before and after with paired intervals, the null's p-values, the probe, the verdict."""
    head = ("method", "AUC", "recall women", "recall men", "worst group, recal.", "equal opp. gap, recal.",
            "skew", "skew, recal.", "p AUC", "p skew", "p worst", "probe", "verdict")  # fmt: skip
    body = []
    for found in audits:
        raw, again = found["raw"], found["recalibrated"]
        p = {test["measure"]: number(test["p"]) for test in found["nulls"]}
        body.append(
            [
                found["method"],
                change(found["auc"]),
                change(raw["recall_woman"]),
                change(raw["recall_man"]),
                change(again["worst_group_accuracy"]),
                change(again["equal_opportunity_gap"]),
                change(raw["skew"]),
                change(again["skew"]),
                *(p.get(name, "") for name in ("auc", "skew", "worst_group_accuracy")),
                change(found["probe"]),
                found["verdict"],
            ]
        )
    return grid(head, body)


def labels_table(labels: dict[str, Any]) -> str:
    """Return what each modality label holds of gender."""
    head = ("label", "features", "gap share, images", "women / men", "gap share, texts", "women / men")
    body = [
        [
            label,
            str(entry["features"]),
            number(entry["image"]["share_of_gap"], 2),
            f"{entry['image']['of_women']} / {entry['image']['of_men']}",
            number(entry["text"]["share_of_gap"], 2),
            f"{entry['text']['of_women']} / {entry['text']['of_men']}",
        ]
        for label, entry in labels.items()
    ]
    return grid(head, body)


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of like dictionaries."""
    if not rows:
        return "None."
    head = tuple(name.replace("_", " ") for name in rows[0])
    return grid(head, [[cell(value) for value in row.values()] for row in rows])


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def change(value: dict[str, Any]) -> str:
    """Return before, after and the interval of the difference."""
    before, after, difference = (value[part] for part in ("before", "after", "difference"))
    if before["value"] is None or after["value"] is None:
        return "-"
    interval = "" if difference["low"] is None else f" [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return f"{before['value']:.2f} to {after['value']:.2f}{interval}"


def cell(value: Any) -> str:
    """Return a value of a row as text."""
    return number(value, 2) if isinstance(value, float) else str(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"
