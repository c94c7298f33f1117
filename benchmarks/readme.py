"""Write the README's figures: what a stranger should know first, each with the command that measures it.

`python -m benchmarks.readme`, or `make figures`

Figures of the models come from the embedded bundle, of its bias study from `work/bias.json`, and of what it draws from
`out/bench/generation.json`; each is of data that chose nothing, with its interval and with a baseline or control beside
it. All are kept in `benchmarks/figures.json`, so that the README can be written, and checked, where nothing was
measured; what a run does not find stays as it was. It also draws `docs/figures/features.webp`: some features with the
drawings that activate them most.
"""

from __future__ import annotations

import io
import itertools
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from services.modality.modalities import Modality
from services.modality.tables import CardSample

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "figures.json"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "figures" / "features.webp"
BENCH, WORK = ROOT / "out" / "bench", ROOT / "work"
BEGIN, END = "<!-- figures: written by `make figures` -->", "<!-- end of figures -->"

Values = dict[str, Any]
# What draws, in a bundle.
UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"
# Beside a figure that a benchmark of the embedded bundle took on another one.
ELSEWHERE = r"\*"
# A feature is shown with at least so many.
MIN_EXAMPLES = 4
# Where each figure is: a file, and the way to it; see `look_up`.
FROM_BUNDLE = {
    "default": "manifest.json:default_dictionary",
    "validation": "manifest.json:metrics/retrieval/validation/towers",
    "validation_pixels": "manifest.json:metrics/retrieval/validation/pixels/1",
    "test": "manifest.json:metrics/retrieval/test/towers",
    "test_pixels": "manifest.json:metrics/retrieval/test/pixels/1",
    "dictionary": "manifest.json:metrics/dictionaries/test/{default}",
    "round_trip_kept": "manifest.json:metrics/dictionaries/test/{default}/kept/r1_round_trip",
    "codes_kept": "manifest.json:metrics/dictionaries/test/{default}/kept/r1_codes",
    "sae_codes_kept": "manifest.json:metrics/dictionaries/test/sae/kept/r1_codes",
    "labels": "manifest.json:metrics/modality/{default}/labels",
    "shuffled": "manifest.json:metrics/modality/{default}/cross_on_shuffled_pairs",
    "kappa": "manifest.json:metrics/modality/{default}/kappa_halves",
    "kappa_seeds": "manifest.json:metrics/modality/{default}/kappa_seeds",
    "wins_image": "manifest.json:metrics/modality/{default}/monosemanticity/image/win_rate/10",
    "wins_text": "manifest.json:metrics/modality/{default}/monosemanticity/text/win_rate/10",
    "random_image": "manifest.json:metrics/modality/{default}/monosemanticity/image/embeddings/win_rate/10",
    "random_text": "manifest.json:metrics/modality/{default}/monosemanticity/text/embeddings/win_rate/10",
    "neurons_image": "manifest.json:metrics/modality/neurons/monosemanticity/image/win_rate/10",
    "neurons_text": "manifest.json:metrics/modality/neurons/monosemanticity/text/win_rate/10",
    "attacked_one": "defense/defense.json:figures/openmoji/one look/detected/1%",
    "attacked_two": "defense/defense.json:figures/openmoji/two looks/detected/1%",
    "clean_one": "defense/defense.json:figures/openmoji/one look/false_positives/1%",
    "clean_two": "defense/defense.json:figures/openmoji/two looks/false_positives/1%",
    "noise_alone": "defense/defense.json:figures/single_scores/pgd 4|255/noise",
    "all_scores": "defense/defense.json:figures/detection/pgd 4|255/one look/auroc",
    "evades_one": "defense/defense.json:figures/adaptive/one look/4|255/evades",
    "evades_two": "defense/defense.json:figures/adaptive/two looks/4|255/evades",
    "undefended": "defense/defense.json:figures/adaptive/one look/4|255/undefended",
}
FROM_WORK = {
    "bias_chosen": "bias.json:chosen",
    "bias_auc": "bias.json:test/audits/0/auc",
    "bias_skew": "bias.json:test/audits/0/recalibrated/skew",
    "bias_probe": "bias.json:test/audits/0/probe",
    "bias_nulls": "bias.json:test/audits/0/nulls",
    "bias_harms": "bias.json:test/audits/0/harms",
    "bias_verdict": "bias.json:test/audits/0/verdict",
}
FROM_BENCH = {
    "following": "generation.json:following/generated",
    "following_real": "generation.json:following/real",
    "following_unet": "generation.json:unet",
}


def look_up(folder: Path, place: str, values: Mapping[str, Any]) -> Any:
    """Return what is at a place such as `file.json:key/key`; None where there is no such file or key.

    A key may hold `|` for a slash, and `{name}` for a value that was found before.
    """
    name, _, way = place.format_map(values).partition(":")
    path = folder / name
    if not path.exists():
        return None
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    for step in way.split("/"):
        key = step.replace("|", "/")
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError):
            return None
    return found


def collect(kept: Values, bundle: Path, work: Path | None, bench: Path | None) -> Values:
    """Return the figures that can be found now; the others as they were kept."""
    loaded = Bundle.load(bundle, verify=False)
    values: Values = {"bundle": loaded.id}
    if UNET in loaded.manifest.files:
        values["unet"] = loaded.manifest.files[UNET].sha256
    for folder, places in ((bundle, FROM_BUNDLE), (work, FROM_WORK), (bench, FROM_BENCH)):
        for name, place in places.items():
            found = None if folder is None else look_up(folder, place, values)
            if found is None:
                found = kept.get(name)
            if found is not None:
                values[name] = found
    return values


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes
    ----------
    what
        Is measured.
    figure
        With its 95% interval.
    beside
        The baseline or control, without which the figure would say nothing.
    source
        The command that measures it.
    """

    what: str
    figure: str
    beside: str
    source: str


def percent(figure: Any) -> str:
    """Write a share with its interval; KeyError where it has none."""
    value = figure["value"] if "value" in figure else figure["mean"]
    return f"{value:.0%} [{100 * figure['low']:z.0f}, {100 * figure['high']:.0f}]"


def number(figure: Any) -> str:
    """Write a number with its interval; KeyError where it has none."""
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def change(figure: Any) -> str:
    """Write a figure before and after, with the interval of the difference."""
    before, after, difference = (figure[part] for part in ("before", "after", "difference"))
    interval = f"[{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return f"{before['value']:.2f} to {after['value']:.2f} (difference {interval})"


def elsewhere(v: Values, name: str, part: str = "bundle") -> str:
    """Return the sign of another bundle, unless what `name` recorded (its id, or a hash) is that of the table's."""
    return "" if v.get(name) == v.get(part) else f" {ELSEWHERE}"


def rows(v: Values) -> list[Row]:
    """Return the table's rows, without those of which something is missing."""
    made: list[Callable[[], Row]] = [
        lambda: Row(
            "caption of a held-out drawing, first guess",
            f"{percent(v['validation']['image_to_text']['1'])} of {v['validation']['candidates']:,} captions",
            f"nearest neighbour on pixels {percent(v['validation_pixels'])}",
            "`make bundle`",
        ),
        lambda: Row(
            "the same, of an artist never seen",
            f"{percent(v['test']['image_to_text']['1'])} of {v['test']['candidates']:,}",
            f"on pixels {percent(v['test_pixels'])}",
            "`make bundle`",
        ),
        lambda: Row(
            "of that, kept by the default dictionary",
            f"{percent(v['round_trip_kept'])} after the round trip, {percent(v['codes_kept'])} on its "
            f"{v['dictionary']['l0_image']:.0f} active features alone",
            f"on the codes of `sae`, {percent(v['sae_codes_kept'])}",
            "`make bundle`",
        ),
        lambda: Row(
            "features labelled the same on two halves of the pairs (kappa); the shares describe the dictionary: "
            + ", ".join(f"{name} {share:.0%}" for name, share in v["labels"].items()),
            number({**v["kappa"], "value": v["kappa"]["kappa"]}),
            f"of other seeds {number({**v['kappa_seeds'], 'value': v['kappa_seeds']['kappa']})}; CROSS on shuffled "
            f"pairs {v['shuffled']:.0%}",
            "`make bundle`",
        ),
        lambda: Row(
            "top pictures (texts) of a feature more alike than random ones",
            f"{percent(v['wins_image'])} ({percent(v['wins_text'])})",
            f"random embeddings as features {percent(v['random_image'])} ({percent(v['random_text'])}); neurons "
            f"{percent(v['neurons_image'])} ({percent(v['neurons_text'])})",
            "`make bundle`",
        ),
        lambda: Row(
            f"gender after ablating `{v['bias_chosen']}`, artist never seen: **{v['bias_verdict']}**"
            + "".join(f"; worse: {name.replace('_', ' ')}" for name in v["bias_harms"]),
            f"a classifier trained anew {change(v['bias_probe'])}, AUC {change(v['bias_auc'])}, skew of ungendered "
            f"professions {change(v['bias_skew'])}",
            f"as many random features: p {_p(v['bias_nulls'], 'auc'):.3f} (AUC)",
            "`python -m training.bias.run --test`",
        ),
        lambda: Row(
            "PGD 4/255 found at 1% false positives, artist never seen",
            f"{percent(v['attacked_one'])} by one look, {percent(v['attacked_two'])} by two",
            f"clean drawings called adversarial: {percent(v['clean_one'])}, {percent(v['clean_two'])}",
            "`python -m training.defense.run --test`",
        ),
        lambda: Row(
            "the same by the noise in the picture alone, without any feature (AUROC)",
            number(v["noise_alone"]),
            f"all scores of one look {number(v['all_scores'])}",
            "`python -m training.defense.run`",
        ),
        lambda: Row(
            "wrong and not found, of an attacker who knows the defence",
            f"{percent(v['evades_one'])} by one look, {percent(v['evades_two'])} by two",
            f"right without attack and defence {percent(v['undefended'])}",
            "`python -m training.defense.run`",
        ),
        lambda: Row(
            "generated drawings whose caption a judge finds among 100",
            percent(v["following"]) + elsewhere(v, "following_unet", "unet"),
            f"real drawings {percent(v['following_real'])}; chance 1%",
            "`python -m benchmarks.generation`",
        ),
    ]
    found = []
    for row in made:
        try:
            found.append(row())
        except (KeyError, TypeError, StopIteration):
            continue
    return found


def _p(nulls: Any, measure: str) -> float:
    return next(float(test["p"]) for test in nulls if test["measure"] == measure)


def block(values: Values) -> str:
    """Return what stands between the markers."""
    made = rows(values)
    lines = [
        "| what | figure | beside it | measured by |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.figure} | {row.beside} | {row.source} |" for row in made),
    ]
    note = f"Bundle `{values['bundle']}`. Brackets are 95% intervals."
    if any(ELSEWHERE in row.figure for row in made):
        note += f" {ELSEWHERE} Measured on another bundle, or on one that was not recorded."
    return "\n".join([BEGIN, *lines, "", note, END])


def put_into(page: str, values: Values) -> str:
    """Return the page with its block written anew."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return before + block(values) + after


def features_picture(bundle: Bundle, rows_a_label: int = 2, examples: int = 6, side: int = 48) -> Image.Image:
    """Draw features with what activates them most: drawings, or texts for TEXT; those whose examples are most alike."""
    table, cards = bundle.modality(), bundle.cards()
    gap, words = 6, 190
    chosen: list[tuple[int, list[CardSample]]] = []
    for label in ("IMAGE", "CROSS", "TEXT"):
        modality = Modality.TEXT if label == "TEXT" else Modality.IMAGE
        alike = table.emb_sim_text if modality is Modality.TEXT else table.emb_sim_image
        score = np.nan_to_num(alike, nan=-1.0) * np.nan_to_num(table.name_auc)
        best = [int(j) for j in np.argsort(-score) if table.label[j] == label]
        top = ((j, cards.top(j, modality.value, examples)) for j in best)
        chosen += itertools.islice((one for one in top if len(one[1]) >= MIN_EXAMPLES), rows_a_label)
    width = words + examples * (side + gap)
    sheet = Image.new("RGB", (width, len(chosen) * (side + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (feature, shown) in enumerate(chosen):
        edge = gap + row * (side + gap)
        pen.text((gap, edge + 6), str(table.name[feature]), fill="black", font=font)
        label = f"{table.label[feature]}, MDS {table.mds_energy[feature]:.2f}"
        pen.text((gap, edge + 26), label, fill="dimgray", font=font)
        if table.label[feature] == "TEXT":
            texts = textwrap.wrap("; ".join(sample.text for sample in shown), width=(width - words) // 7)
            pen.text((words, edge + 6), "\n".join(texts[:2]), fill="black", font=font)
            continue
        for column, sample in enumerate(shown):
            picture = Image.open(io.BytesIO(sample.thumbnail)).convert("RGB").resize((side, side))
            sheet.paste(picture, (words + column * (side + gap), edge))
    return sheet


def main() -> None:
    """Write all three."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    values = collect(kept, EMBEDDED_BUNDLE, WORK, BENCH)
    KEPT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    README.write_text(put_into(README.read_text(encoding="utf-8"), values), encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    features_picture(Bundle.load(EMBEDDED_BUNDLE)).save(PICTURE, quality=80)
    print(f"{block(values)}\n{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
