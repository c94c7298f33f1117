"""Write the figures of docs/generation.md: what the embedded text-to-image model is worth, and how long it takes.

`python -m benchmarks.generation_page`, or `make figures`

They come from the bundle and from out/bench/generation.json and picture_time.json, as the last run of each benchmark
left them, and are kept in `benchmarks/generation_figures.json`, so that the page can be checked where nothing was
measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.readme import UNET
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from training.diffusion.choose import RECORD

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "generation_figures.json"
PAGE = ROOT / "docs" / "generation.md"
BENCH = ROOT / "out" / "bench"
BEGIN, END = "<!-- figures: written by `make figures` -->", "<!-- end of figures -->"
# Of a benchmark's result, what the page shows.
SHOWN = ("unet", "following", "combinations", "kid", "copies", "autoencoder", "pictures", "judge")


def collect(kept: dict[str, Any], bundle: Path, bench: Path | None) -> dict[str, Any]:
    """Return the figures that can be found now; the others as they were kept."""
    loaded = Bundle.load(bundle, verify=False)
    values = dict(kept)
    values["unet"] = loaded.manifest.files[UNET].sha256
    values["choice"] = json.loads((bundle / "diffusion" / RECORD).read_text(encoding="utf-8"))
    folders: dict[str, int] = {}
    for path, file in loaded.manifest.files.items():
        top = path.split("/")[1] if path.startswith("diffusion/") else ""
        if top and top.find(".") < 0:
            folders[top] = folders.get(top, 0) + file.bytes
    values["diffusion_bytes"] = folders
    if bench is not None and (bench / "generation.json").exists():
        found = json.loads((bench / "generation.json").read_text(encoding="utf-8"))
        values["generation"] = {name: found[name] for name in SHOWN}
    if bench is not None and (bench / "picture_time.json").exists():
        values["picture_time"] = json.loads((bench / "picture_time.json").read_text(encoding="utf-8"))
    return values


def interval(figure: dict[str, float], digits: int = 3) -> str:
    """Write a figure with its interval."""
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def quality(g: dict[str, Any]) -> list[str]:
    """Return the table of what pictures are worth."""
    follow, kid, copies = g["following"], g["kid"], g["copies"]
    combined = g["combinations"]
    below = copies["generated_below_real_1%"]
    return [
        "| figure | generated | real | real, autoencoded |",
        "|---|---|---|---|",
        f"| judge finds the caption among 100, {g['pictures']['captions']} captions of drawings held out | "
        + " | ".join(interval(follow[k]) for k in ("generated", "real", "autoencoded"))
        + " |",
        f"| the same, {combined['count']} unseen combinations, among captions with a profession | "
        + " | ".join(interval(combined[k]) for k in ("generated", "real"))
        + " | |",
        "| KID x 1,000 to training drawings of other captions, at 64 px | "
        + " | ".join(interval(kid[k], 0) for k in ("generated", "real", "autoencoded"))
        + " |",
        f"| cosine distance to the nearest training drawing, median | {copies['generated'][3]:.3f} | "
        f"{copies['held_out_real'][3]:.3f} | |",
        f"| nearer to one than 99% of drawings held out are | {below:.1%} | 1.0% | |",
        f"| PSNR of the autoencoder, drawings held out | | | {interval(g['autoencoder']['psnr'], 1)} |",
        "",
        f"The judge itself: on held-out drawings of the training artists it finds the caption among 100 in "
        f"{interval(g['judge']['validation']['among_100'])}, on openmoji's, which nothing here was trained on, in "
        f"{interval(g['judge']['test']['among_100'])}.",
    ]


def former(f: dict[str, Any]) -> str:
    """Return what the pipeline before this one was worth, as this benchmark measured it then."""
    return (
        f"The former pipeline, of {f['side']} px, on captions of drawings that it was trained on: judge "
        f"{interval(f['following'])}; unseen combinations {interval(f['combinations'])}; KID x 1,000 "
        f"{interval(f['kid'], 0)}."
    )


def timing(t: dict[str, Any]) -> list[str]:
    """Return the table of how long a picture takes."""
    counts = list(t["bundles"][0]["seconds"])
    return [
        "| pipeline | " + " | ".join(f"{n} at once, s a picture (CPU s)" for n in counts) + " |",
        "|---|" + "---|" * len(counts),
        *(
            f"| `{b['bundle']}`, {b['pixels']} px, {b['steps']} steps | "
            + " | ".join(f"{b['seconds'][n]:.2f} ({b['cpu_seconds'][n]:.2f})" for n in counts)
            + " |"
            for b in t["bundles"]
        ),
        "",
        f"float32, {t['threads']} threads. Load of the machine while it was measured: {t['load']:.0f}; the time on the "
        "clock is longer by it, the processors' own hardly.",
    ]


def choice(c: dict[str, Any]) -> list[str]:
    """Return the table by which solver, steps and guidance were chosen."""
    return [
        "| chosen in turn | solver | steps | guidance | judge, among 100 | KID x 1,000 | |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['stage']} | {r['solver']} | {r['steps']} | {r['guidance']:g} | {interval(r['judge'])} | "
            f"{r['kid_1000']:.0f} | {'chosen' if r['chosen'] else ''} |"
            for r in c["table"]
        ),
    ]


def block(v: dict[str, Any]) -> str:
    """Return what stands between the markers; tables whose figures are missing, or of another UNet, are left out."""
    lines = [BEGIN]
    g = v.get("generation")
    if g is not None and g["unet"] == v["unet"]:
        lines += [*quality(g), "", *([former(v["former"]), ""] if "former" in v else [])]
    if "picture_time" in v:
        lines += [*timing(v["picture_time"]), ""]
    lines += [f"Solver, steps and guidance were chosen on {v['choice']['captions']} captions:", ""]
    return "\n".join([*lines, *choice(v["choice"]), END])


def put_into(page: str, values: dict[str, Any]) -> str:
    """Return the page with its block written anew."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return before + block(values) + after


def main() -> None:
    """Write both."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    values = collect(kept, EMBEDDED_BUNDLE, BENCH)
    KEPT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), values), encoding="utf-8")
    print(block(values))


if __name__ == "__main__":
    main()
