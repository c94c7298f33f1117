"""The page of ``monofacet gender audit --html``: tables and plots, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import html

import numpy as np

from monofacet._types import AblationAudit, AuditResult, AuditVerdict, Change, Estimate, NullTest

VERDICTS = {
    AuditVerdict.EFFECT: "a figure that no threshold can change changed, more than by random features, and a "
    "classifier that is trained anew tells the genders less well",
    AuditVerdict.SILENCED: "the score changed, but a classifier that is trained anew tells the genders as well "
    "as before",
    AuditVerdict.NOT_SPECIFIC: "random features of like size and energy do the same",
    AuditVerdict.THRESHOLD_ONLY: "scores were shifted: one gender gains what the other loses; no effect",
    AuditVerdict.NO_EFFECT: "nothing changed beyond chance",
}
BEFORE, AFTER, NULL = "#0072B2", "#D55E00", "#999999"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; background: #f6f8f9; margin: 0 }
main { max-width: 1000px; margin: 0 auto; padding: 2rem 1rem 4rem }
section { background: #fff; border: 1px solid #dfe4e8; border-radius: 8px; padding: 1rem; margin: 1rem 0;
  overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #dfe4e8; white-space: nowrap }
th:first-child, td:first-child { text-align: left } .soft { color: #5d6872 }
svg { font: 11px system-ui, sans-serif; max-width: 100%; height: auto } h2 { margin: 2rem 0 0 }
"""
MEASURES = {
    "accuracy": "Accuracy",
    "recall_woman": "Recall of women",
    "recall_man": "Recall of men",
    "gender_gap": "Gap between them",
    "worst_group_accuracy": "Worst group",
    "equal_opportunity_gap": "Equal-opportunity gap",
    "equalized_odds_gap": "Equalized-odds gap",
    "demographic_parity_gap": "Demographic-parity gap",
    "skew": "Skew of the ungendered",
}


def page(result: AuditResult) -> str:
    """Write the page.

    Parameters
    ----------
    result
        Of the server.

    Returns
    -------
    str
        A whole HTML document.
    """
    counts = f"{result.women} women, {result.men} men, {result.ungendered} ungendered items"
    skipped = f"; {result.skipped} left out" if result.skipped else ""
    used = result.settings
    parts = [
        "<h1>Gender audit</h1>",
        f'<p class="soft">{html.escape(result.bundle)}: {counts}{skipped}. {used.bootstrap_samples} bootstrap '
        f"samples over clusters, {used.null_sets} random feature sets, seed {used.seed}. Brackets are 95% "
        "intervals; differences are paired.</p>",
        *(_audit(found) for found in result.audits),
    ]
    if result.skipped_items:
        rows = [[str(item.index), item.id, item.message, item.reason] for item in result.skipped_items]
        parts.append("<h2>Left out</h2>" + _section(_table(["item", "id", "why", "reason"], rows)))
    parts.append(
        "<h2>Read with care</h2><section><p>The audit measures what the towers do with these items. It does not "
        "tell anybody's gender, knows two classes only, and must not be used to decide about people. A skew of 0 "
        "means that the score says nothing, not that the towers know nothing: the retrained probe asks that.</p>"
        "</section>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Gender audit</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _audit(found: AblationAudit) -> str:
    head = ["", "before", "after", "difference", "recalibrated: before", "after", "difference"]
    rows = [
        ["AUC, woman against man", *_cells(found.auc), "", "", ""],
        ["Retrained probe", *_cells(found.probe), "", "", ""],
    ]
    for name, title in MEASURES.items():
        rows.append([title, *_cells(getattr(found.raw, name)), *_cells(getattr(found.recalibrated, name))])
    kept = f"cosine kept {found.kept:.3f}, neighbours kept {found.neighbours_kept:.0%}"
    worse = f" Worse after it: {', '.join(found.harms).replace('_', ' ')}." if found.harms else ""
    parts = [
        f"<h2>{html.escape(str(found.ablation))}</h2>",
        f'<p><b>{found.verdict}</b>: {VERDICTS[found.verdict]}. <span class="soft">{found.set_size} features, '
        f"{kept}.{worse}</span></p>",
        _section(_table(head, rows)),
    ]
    if found.professions:
        parts.append(_section("<h3>By profession</h3>" + professions_plot(found)))
    if found.nulls:
        ratio = (
            ""
            if found.null_energy_ratio is None
            else f" Their energy is {found.null_energy_ratio:.2f} of the set's."
        )
        parts.append(
            _section(
                "<h3>Against random features</h3>"
                f'<p class="soft">Grey: the change by random sets of like firing rate and energy.{ratio}</p>'
                + "".join(null_plot(test) for test in found.nulls)
            )
        )
    if len(found.curve):
        parts.append(_section("<h3>Threshold</h3>" + threshold_plot(found)))
    return "".join(parts)


def professions_plot(found: AblationAudit) -> str:
    """Draw accuracy and P(woman) of each profession before and after, with intervals.

    Parameters
    ----------
    found
        With professions.

    Returns
    -------
    str
        An SVG element.
    """
    items = found.professions[:60]
    row, left, width, gap = 20, 170, 330, 60
    height = row * len(items) + 46
    parts = [_key(left, 10)]
    for column, (title, name) in enumerate(
        (("accuracy", "accuracy"), ("P(woman) of the ungendered", "p_woman"))
    ):
        x0 = left + column * (width + gap)
        parts.append(_text(x0 + width / 2, 28, title, "middle"))
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            x = x0 + tick * width
            parts.append(_line(x, 34, x, height - 14, "#dfe4e8" if tick != 0.5 else "#9aa5ad"))
            parts.append(_text(x, height - 2, f"{tick:g}", "middle"))
        for i, item in enumerate(items):
            y = 44 + row * i
            if column == 0:
                parts.append(_text(left - 8, y + 4, item.profession[:26], "end"))
            change: Change = getattr(item, name)
            for estimate, colour, shift in ((change.before, BEFORE, -3), (change.after, AFTER, 3)):
                parts.append(_dot(estimate, x0, width, y + shift, colour))
    return _svg(left + 2 * width + gap + 20, height, parts)


def null_plot(test: NullTest) -> str:
    """Draw the histogram of a null, with what was observed.

    Parameters
    ----------
    test
        One test.

    Returns
    -------
    str
        An SVG element.
    """
    width, height, base = 300, 130, 96
    values = test.null[np.isfinite(test.null)]
    ends = (
        [float(values.min()), float(values.max()), test.observed, 0.0]
        if len(values)
        else [test.observed, 0.0]
    )
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span
    counts, edges = np.histogram(values, bins=40, range=(low, high))
    top = max(int(counts.max()), 1)

    def place(value: float) -> float:
        return 10 + (value - low) / (high - low) * (width - 20)

    parts = [_text(width / 2, 14, f"{test.measure}: {test.observed:+.3f}, p = {test.p:.3f}", "middle")]
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            bar = 66.0 * float(count) / top
            parts.append(
                f'<rect x="{place(start):.1f}" y="{base - bar:.1f}" width="{place(end) - place(start):.1f}" '
                f'height="{bar:.1f}" fill="{NULL}"/>'
            )
    parts.append(_line(10, base, width - 10, base, "#9aa5ad"))
    parts.append(_line(place(test.observed), 22, place(test.observed), base + 4, AFTER, 2))
    for value in (low, 0.0, high):
        parts.append(_text(place(value), base + 18, f"{value:+.2f}", "middle"))
    return _svg(width, height, parts)


def threshold_plot(found: AblationAudit) -> str:
    """Draw both recalls over the threshold, before and after.

    Parameters
    ----------
    found
        With a curve.

    Returns
    -------
    str
        An SVG element.
    """
    width, height, left, base = 640, 260, 40, 220
    curve = found.curve.astype(np.float64)
    low, high = float(curve[0, 0]), float(curve[-1, 0])
    span = (high - low) or 1.0

    def points(column: int) -> str:
        return " ".join(
            f"{left + (row[0] - low) / span * (width - left - 10):.1f},{base - row[column] * 180:.1f}"
            for row in curve
        )

    parts = [
        _text(left, 14, "recall; solid: women, dashed: men", "start"),
        _key(left + 230, 10),
        _line(left, base, width - 10, base, "#9aa5ad"),
    ]
    for tick in (0.0, 0.5, 1.0):
        parts += [_line(left, base - tick * 180, width - 10, base - tick * 180, "#dfe4e8")]
        parts += [_text(left - 6, base - tick * 180 + 4, f"{tick:g}", "end")]
    for column, colour, dash in ((1, BEFORE, ""), (2, BEFORE, "4 3"), (3, AFTER, ""), (4, AFTER, "4 3")):
        parts.append(
            f'<polyline points="{points(column)}" fill="none" stroke="{colour}" stroke-width="1.6" '
            f'stroke-dasharray="{dash}"/>'
        )
    for value in (low, (low + high) / 2, high):
        x = left + (value - low) / span * (width - left - 10)
        parts.append(_text(x, base + 16, f"{value:+.3f}", "middle"))
    parts.append(_text((left + width) / 2, base + 34, "threshold on the score", "middle"))
    return _svg(width, height, parts)


def _dot(estimate: Estimate, x0: float, width: float, y: float, colour: str) -> str:
    if estimate.value is None:
        return ""
    mark = f'<circle cx="{x0 + estimate.value * width:.1f}" cy="{y}" r="3" fill="{colour}"/>'
    if estimate.low is None or estimate.high is None:
        return mark
    return _line(x0 + estimate.low * width, y, x0 + estimate.high * width, y, colour, 1.4) + mark


def _key(x: float, y: float) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="4" fill="{BEFORE}"/>{_text(x + 8, y + 4, "before", "start")}'
        f'<circle cx="{x + 70}" cy="{y}" r="4" fill="{AFTER}"/>{_text(x + 78, y + 4, "after", "start")}'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>'
    )


def _section(content: str) -> str:
    return f"<section>{content}</section>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def _cells(change: Change) -> list[str]:
    difference = change.difference
    shown = "" if difference.value is None else f"{difference.value:+.3f}"
    if difference.low is not None and difference.high is not None:
        shown += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return [
        _figure(change.before, change.before_by_chance),
        _figure(change.after, change.after_by_chance),
        shown,
    ]


def _figure(estimate: Estimate, by_chance: float | None) -> str:
    chance = "" if by_chance is None else f" (chance {by_chance:.3f})"
    return "" if estimate.value is None else f"{estimate.value:.3f}{chance}"
