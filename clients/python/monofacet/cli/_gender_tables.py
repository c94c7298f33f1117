"""What ``monofacet gender`` prints for people: tables of classifications and audits."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from monofacet._types import (
    Ablation,
    AblationAudit,
    AuditResult,
    AuditVerdict,
    Change,
    Estimate,
    GenderResult,
    GenderScore,
)
from monofacet.cli._gender_page import VERDICTS
from monofacet.cli._inputs import shorten
from monofacet.cli._session import Session

VERDICT_COLOURS = {
    AuditVerdict.EFFECT: "green",
    AuditVerdict.SILENCED: "yellow",
    AuditVerdict.NOT_SPECIFIC: "yellow",
    AuditVerdict.THRESHOLD_ONLY: "yellow",
    AuditVerdict.NO_EFFECT: "white",
}
MEASURES = {
    "accuracy": "accuracy",
    "recall_woman": "recall of women",
    "recall_man": "recall of men",
    "gender_gap": "gap between them",
    "worst_group_accuracy": "worst group",
    "equal_opportunity_gap": "equal-opportunity gap",
    "equalized_odds_gap": "equalized-odds gap",
    "demographic_parity_gap": "demographic-parity gap",
    "skew": "skew of the ungendered",
}


def show_classes(
    session: Session, names: list[str], result: GenderResult, recommended: Ablation | None
) -> None:
    """Print a row an input: how gendered it is, and after the ablation if there is one."""
    ablated = result.ablation is not None
    title = f"{result.bundle}, nothing removed"
    if result.ablation is not None:
        own = " (the bundle's recommendation)" if result.ablation == recommended else ""
        of = f" of {result.ablation.dictionary}" if result.ablation.dictionary else ""
        title = f"{result.bundle}, without {result.ablation}{of}{own}: {result.set_size} features"
    columns = ["input", "score", "P(woman)", "calibrated"]
    table = Table(*columns, *(["after", "calibrated", "kept", "removed"] if ablated else []), title=title)
    for name, item in zip(names, result.classifications, strict=True):
        row = [escape(shorten(name)), f"{item.before.score:+.3f}", *_probabilities(item.before)]
        if ablated and item.after is not None:
            row += [*_probabilities(item.after), _number(item.kept), str(item.ablated_features)]
        table.add_row(*row)
    session.console.print(table)


def _probabilities(score: GenderScore) -> list[str]:
    return [f"{score.p_woman:.3f}", f"{score.p_woman_calibrated:.3f}"]


def show_audits(session: Session, result: AuditResult) -> None:
    """Print the verdict and the measures of each ablation, and what was left out."""
    console = session.console
    console.print(
        f"{result.bundle}: {result.women} women, {result.men} men, {result.ungendered} ungendered"
        + (f", {result.skipped} left out" if result.skipped else "")
    )
    for found in result.audits:
        colour = VERDICT_COLOURS[found.verdict]
        console.print(
            f"\n[bold]{escape(str(found.ablation))}[/] ({found.set_size} features): "
            f"[{colour}]{found.verdict}[/] - {VERDICTS[found.verdict]}"
        )
        console.print(_measures(found))
        if found.professions:
            console.print(_professions(found))
    for item in result.skipped_items[:20]:
        console.print(
            f"left out: item {item.index} {escape(item.id)}: {escape(item.message)} ({item.reason})"
        )


def _measures(found: AblationAudit) -> Table:
    table = Table(
        "", "before", "after", "difference", "recalibrated: before", "after", "difference", "null p"
    )
    p = {test.measure: f"{test.p:.3f}" for test in found.nulls}
    table.add_row("AUC, woman against man", *_cells(found.auc), "", "", "", p.get("AUC", ""))
    table.add_row("retrained probe", *_cells(found.probe), "", "", "", "")
    for name, title in MEASURES.items():
        raw, again = getattr(found.raw, name), getattr(found.recalibrated, name)
        table.add_row(title, *_cells(raw), *_cells(again), p.get(name.upper(), ""))
    table.caption = f"cosine kept {found.kept:.3f}, neighbours kept {found.neighbours_kept:.0%}" + (
        "" if found.null_energy_ratio is None else f", energy of random sets {found.null_energy_ratio:.2f}"
    )
    if found.harms:
        table.caption += f"; worse after it: {', '.join(found.harms).replace('_', ' ')}"
    return table


def _professions(found: AblationAudit) -> Table:
    table = Table(
        "profession", "women / men / none", "accuracy", "after", "P(woman) of the ungendered", "after"
    )
    for item in found.professions[:40]:
        table.add_row(
            escape(item.profession),
            f"{item.women} / {item.men} / {item.ungendered}",
            _estimate(item.accuracy.before),
            _estimate(item.accuracy.after),
            _estimate(item.p_woman.before),
            _estimate(item.p_woman.after),
        )
    return table


def _cells(change: Change) -> list[str]:
    difference = change.difference
    shown = "" if difference.value is None else f"{difference.value:+.3f}"
    if difference.low is not None and difference.high is not None:
        shown += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return [
        _number(change.before.value) + _by_chance(change.before_by_chance),
        _number(change.after.value) + _by_chance(change.after_by_chance),
        escape(shown),
    ]


def _by_chance(value: float | None) -> str:
    return "" if value is None else f" (chance {value:.3f})"


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return escape(f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
