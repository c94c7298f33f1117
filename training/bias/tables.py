"""The study's figures as tables, for Markdown and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.report.tables import FigureTable, as_markdown

PARTS = {
    "validation": "Held-out drawings of the training artists",
    "test": "openmoji, an artist never seen (reported only)",
    "texts": "Captions, in every template",
}
# What the ablation was chosen by; see `training.bias.choose.Choice`.
CHOSEN_BY = {
    "skew_recalibrated": "the least skew of ungendered professions",
    "probe": "how little a classifier that is trained anew tells the genders",
    "auc": "the AUC nearest to 0.5, for want of items to train a classifier on",
    "r1_kept": "the retrieval kept, for none keeps enough",
}
SIDES = {"image": "pictures", "text": "captions"}
# Below it a classifier of two classes is of no use.
WEAK_AUC = 0.7
HEAD = ("method", "features", "R@1 kept", "AUC", "skew", "skew recal.", "gap", "worst group", "probe")


def summary(metrics: dict[str, Any], titles: Mapping[str, str] = PARTS) -> str:
    """Return in sentences what was chosen and what it did; `titles` say what each part is."""
    rows = {row["method"]: row for row in metrics["validation"]["methods"]}
    nothing, chosen = rows["nothing"], rows[metrics["chosen"]]
    parts = [
        f"Ablations of {metrics['dictionary']}; chosen on held-out pairs by verdict, then by {chosen_by(metrics)}: "
        f"{metrics['chosen']}, which keeps {chosen['r1_kept']:.0%} of the retrieval of pictures that show no people."
    ]
    for part, title in titles.items():
        if part not in metrics:
            continue
        found = metrics[part]["audits"][0]
        p = next((test["p"] for test in found["nulls"] if test["measure"] == "skew"), None)
        skew = found["recalibrated"]["skew"]
        parts.append(
            f"{title}: AUC {change(found['auc'])}, skew of ungendered professions {change(skew)}"
            + ("" if p is None else f", p {p:.3f}")
            + f", a classifier trained anew {change(found['probe'])}, verdict {found['verdict']}"
            + (f"; worse: {', '.join(found['harms']).replace('_', ' ')}." if found["harms"] else ".")
        )
    if nothing["image"]["auc"] < WEAK_AUC:
        parts.append(
            f"These towers hardly tell the genders (AUC {nothing['image']['auc']:.2f} on held-out pictures): there is "
            "little to remove, and little to conclude."
        )
    return " ".join(parts)


def chosen_by(metrics: dict[str, Any]) -> str:
    """Return in words what the ablation was chosen by."""
    # A work folder from before this was recorded has no such key.
    found = metrics.get("chosen_by", {"figure": "skew_recalibrated", "sides": []})
    words = CHOSEN_BY[found["figure"]]
    return words + "".join(f" ({SIDES[side]} alone)" for side in found["sides"] if len(found["sides"]) == 1)


def tables(metrics: dict[str, Any], titles: Mapping[str, str] = PARTS) -> list[FigureTable]:
    """Return every table of the study; `titles` say what each part is."""
    result = [
        methods_table(titles[part], metrics[part]["methods"], "image")
        for part in ("validation", "test")
        if part in metrics
    ]
    result.append(methods_table(titles["texts"], metrics["validation"]["methods"], "text"))
    result += [
        audits_table(f"Audits: {title}", metrics[part]["audits"])
        for part, title in titles.items()
        if part in metrics
    ]
    result += [
        labels_table("What each modality label holds of gender", metrics["labels"]),
        rows_table("Ungendered professions by artist, at recalibrated thresholds", metrics["by_artist"]),
    ]
    for modality, rows in metrics["by_profession"].items():
        result.append(rows_table(f"Ungendered professions, {modality}", rows))
    return result


def markdown(metrics: dict[str, Any]) -> str:
    """Return the whole study in Markdown."""
    return as_markdown(summary(metrics), tables(metrics))


def methods_table(title: str, rows: Sequence[dict[str, Any]], side: str) -> FigureTable:
    """Return the comparison of all methods, on drawings ("image") or captions ("text")."""
    names = ("auc", "skew", "skew_recalibrated", "gender_gap", "worst_group", "probe")
    body = [
        [row["method"], str(row["features"] or ""), number(row["r1_kept"], 2)]
        + [number(row[side][name]) for name in names]
        for row in rows
    ]
    return FigureTable(title, HEAD, body)


def audits_table(title: str, audits: Sequence[dict[str, Any]]) -> FigureTable:
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
                found["verdict"] + (f" (worse: {', '.join(found['harms'])})" if found["harms"] else ""),
            ]
        )
    return FigureTable(title, head, body)


def labels_table(title: str, labels: dict[str, Any]) -> FigureTable:
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
    return FigureTable(title, head, body)


def rows_table(title: str, rows: Sequence[dict[str, Any]]) -> FigureTable:
    """Return rows of like dictionaries."""
    head = tuple(name.replace("_", " ") for name in rows[0]) if rows else ()
    return FigureTable(title, head, [[cell(value) for value in row.values()] for row in rows])


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
