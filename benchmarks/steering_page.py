"""Write the figures of docs/steering.md: what attributes and labels do to pictures, with their controls.

`python -m benchmarks.steering_page`, or `make figures`

They come from the bundle's attributes and from out/bench/steering.json, as the last run left them, and are kept in
`benchmarks/steering_figures.json`, so that the page can be checked where nothing was measured. What was not measured on
the bundle has no table, and the page says so.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "steering_figures.json"
PAGE = ROOT / "docs" / "steering.md"
BENCH = ROOT / "out" / "bench"
BEGIN, END = "<!-- figures: written by `make figures` -->", "<!-- end of figures -->"
SHOWN = (
    "bundle", "dictionary", "pairs", "features_an_edit", "strength_0_is_unsteered_byte_for_byte", "protocol", "control",
    "effects", "interaction", "interaction_dose", "dose_response",
)  # fmt: skip


def collect(kept: dict[str, Any], bundle: Path, bench: Path | None) -> dict[str, Any]:
    """Return the figures that can be found now; the protocol's as they were kept where it was not run."""
    values = dict(kept)
    known = Bundle.load(bundle, verify=False).attributes()
    values["attributes"] = None if known is None else json.loads(json.dumps(asdict(known.config)))
    if bench is not None and (bench / "steering.json").exists():
        found = json.loads((bench / "steering.json").read_text(encoding="utf-8"))
        values["steering"] = {name: found[name] for name in SHOWN}
    return values


def share(figure: dict[str, float]) -> str:
    """Write a share with its interval."""
    return f"{figure['value']:.0%} [{figure['low']:z.0%}, {figure['high']:z.0%}]"


def signed(figure: dict[str, float]) -> str:
    """Write a difference with its interval."""
    return f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"


def attributes(config: dict[str, Any] | None) -> list[str]:
    """Return the table of attributes."""
    if config is None:
        return ["The embedded bundle has no attributes yet: `ListAttributes` answers an empty list."]
    lines = [
        f"Unit of dose {config['unit']:g}; words fade over {config['fade']:g}.",
        "",
        "| attribute | pictures | hit | without it | concept kept | known without it | off the data | without it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in config["attributes"]:
        m = one["measures"]
        if m is not None:
            far = f"{m['off_distribution']:.2f} | {m['off_distribution_before']:.2f}"
            lines.append(
                f"| {one['name']} | {m['pictures']} | {share(m['hit'])} | {share(m['hit_before'])} |"
                f" {share(m['kept'])} | {share(m['kept_before'])} | {far} |"
            )
    left_out = config["evidence"].get("left_out", {})
    if left_out:
        left = (f"{name} (hit {v['hit']:.0%}, kept {v['kept']:.0%})" for name, v in left_out.items())
        lines += ["", f"Left out by the choosing half: {', '.join(left)}."]
    return lines


def protocol(found: dict[str, Any] | None) -> list[str]:
    """Return the tables of the protocol."""
    if found is None:
        return ["The protocol was not run on this bundle's attributes yet."]
    measured = found["effects"][str(found["interaction_dose"])]
    lines = [
        f"{found['pairs']} pairs, {found['features_an_edit']:.1f} features of `{found['dictionary']}` an edit,"
        f" a dose of {found['interaction_dose']:g}. Shares of the way to the reference."
        f" The protocol **{found['protocol']}**.",
        "",
        f"| measure | none | {' | '.join(measured)} |",
        f"|{'---|' * (len(measured) + 2)}",
    ]
    for name in ("semantic", "low-level"):
        lines.append(f"| {name} | 0 | {' | '.join(signed(group[name]) for group in measured.values())} |")
    for name in ("semantic", "low-level"):
        monotone = (f"{group[name]['monotone']:.0%}" for group in found["dose_response"].values())
        lines.append(f"| {name}: monotone in the dose | | {' | '.join(monotone)} |")
    lines += ["", "| low-level minus semantic | difference | p |", "|---|---|---|"]
    for name, one in {"control: low-level against concept": found["control"], **found["interaction"]}.items():
        lines.append(f"| {name} | {signed(one)} | {one['p']:.4f} |")
    same = "yes" if found["strength_0_is_unsteered_byte_for_byte"] else "NO"
    return [
        *lines,
        "",
        f"Strength 0 gives the unsteered picture byte for byte: {same}. Bundle `{found['bundle']}`.",
    ]


def block(values: dict[str, Any]) -> str:
    """Return what stands between the marks."""
    parts = [*attributes(values.get("attributes")), "", *protocol(values.get("steering"))]
    return "\n".join([BEGIN, *parts, END])


def main() -> None:
    """Collect, keep and write."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    values = collect(kept, EMBEDDED_BUNDLE, BENCH)
    KEPT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + block(values) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
