"""``monofacet bundle``: look into finished bundles, and dictionaries in and out.

It needs no more than serving does. ``monofacet bundle build`` comes from `training`, by an entry point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from services.bundle.load import Bundle

# As the exit codes of `monofacet`: 1 failed, 3 bad input.
FAILED, BAD_INPUT = 1, 3

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a bundle.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for programs.")]


commands = typer.Typer(
    name="bundle",
    help="Look into bundles, and make bundles of your own models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@contextmanager
def _explained() -> Iterator[None]:
    """End with one line where a bundle, or what is to go into it, cannot be used."""
    from services.errors import MonofacetError

    try:
        yield
    except MonofacetError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(BAD_INPUT) from error


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _load(path: Path) -> Bundle:
    from services.bundle.load import Bundle

    return Bundle.load(path, verify=False)


@commands.command("verify")
def verify(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Check a bundle: hashes, fingerprints, shapes, every value finite, no pickle, and what its towers answer.

    The exit code is 0 if all is as it should be, else 1.
    """
    from services.bundle.checks import run_checks

    console = Console(soft_wrap=True)
    checks = []
    for check in run_checks(bundle):
        checks.append(check)
        if not as_json:
            colour, word = ("green", "ok") if check.ok else ("red", "failed")
            console.print(f"[{colour}]{word:>6}[/]  {check.name:<12}  {escape(check.found)}", highlight=False)
    good = all(check.ok for check in checks)
    if as_json:
        _print_json({"ok": good, "checks": [vars(check) for check in checks]})
    if not good:
        raise typer.Exit(FAILED)


@commands.command("inspect")
def inspect(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Show what a bundle holds: towers, dictionaries with their figures, sizes, licences, pipeline."""
    from services.bundle.inspection import inspect_bundle

    with _explained():
        found = inspect_bundle(_load(bundle))
    if as_json:
        _print_json(found)
        return
    console = Console()
    console.print(_facts(found))
    console.print(_dictionaries(found))
    console.print(_labels(found))
    sizes = Table("folder", "MB", title="sizes")
    for folder, size in found["bytes_by_folder"].items():
        sizes.add_row(escape(folder), f"{size / 1e6:,.2f}")
    console.print(sizes)
    licences = Table("licence", "of", "from", title="licences")
    for licence in found["licences"]:
        licences.add_row(*(escape(str(licence[key])) for key in ("name", "applies_to", "source")))
    console.print(licences)


def _facts(found: dict[str, Any]) -> Table:
    facts = Table(show_header=False, title=escape(found["id"]))
    towers, pipeline = found["towers"], found["pipeline"]
    height, width = towers["image_size"]
    facts.add_row("description", escape(found["description"]))
    facts.add_row("sha256", found["sha256"])
    facts.add_row("size", f"{found['bytes'] / 1e6:,.1f} MB")
    facts.add_row(
        "towers",
        f"{height} x {width} pixels, {towers['context_length']} tokens, {towers['embed_dim']} dimensions",
    )
    facts.add_row("fingerprint", towers["fingerprint"])
    facts.add_row(
        "probe", "recorded" if found["probe"] else "none: what the towers answer cannot be compared"
    )
    facts.add_row("calibrated for", ", ".join(found["calibrations"]) or "nothing")
    facts.add_row("samples", str(found["samples"]))
    if pipeline is not None:
        facts.add_row(
            "draws", f"{pipeline['width']} x {pipeline['height']} pixels, {pipeline['pipeline']}"
            + (f", from {pipeline['reference']}" if pipeline["reference"] else ""),
        )  # fmt: skip
    return facts


# Figures that a table has room for, and their headings.
_FIGURES = {
    "fvu": "FVU", "l0_image": "L0 image", "l0_text": "L0 text", "dead": "dead", "r1_round_trip_kept": "R@1 kept",
    "r1_codes_kept": "R@1 on z", "stability": "stability",
}  # fmt: skip


def _dictionaries(found: dict[str, Any]) -> Table:
    shown = [key for key in _FIGURES if any(key in d["figures"] for d in found["dictionaries"])]
    table = Table(title="dictionaries", caption="* the default")
    table.add_column("dictionary", no_wrap=True)
    for heading in ("features", "MB", *(_FIGURES[key] for key in shown)):
        table.add_column(heading, justify="right")
    for d in found["dictionaries"]:
        mark = " *" if d["name"] == found["default_dictionary"] else ""
        metrics = [f"{d['figures'][key]:.3g}" if key in d["figures"] else "" for key in shown]
        table.add_row(escape(d["name"]) + mark, f"{d['n_features']:,}", f"{d['bytes'] / 1e6:,.1f}", *metrics)
    return table


def _labels(found: dict[str, Any]) -> Table:
    labelled = [d for d in found["dictionaries"] if d["labels"]]
    names = list(labelled[0]["labels"]) if labelled else []
    table = Table("dictionary", *(name.lower() for name in names), title="features by label")
    for d in labelled:
        table.add_row(escape(d["name"]), *(f"{d['labels'][name]:,}" for name in names))
    return table


@commands.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(help="Directory of a bundle.")],
    b: Annotated[Path, typer.Argument(help="Directory of the bundle to compare it with.")],
    as_json: AsJson = False,
) -> None:
    """Show in what two bundles differ: manifests, files, and dictionaries feature by feature.

    Features are matched by the cosine of their decoder rows, which needs the same towers.
    """
    from services.bundle.inspection import diff_bundles

    with _explained():
        found = diff_bundles(_load(a), _load(b))
    if as_json:
        _print_json(found)
        return
    console = Console()
    if found["same"]:
        console.print(f"{escape(found['a'])} and {escape(found['b'])} are the same")
        return
    console.print(
        f"{escape(found['a'])} → {escape(found['b'])}; "
        + ("the same" if found["same_towers"] else "other")
        + " towers"
    )
    for key, (old, new) in found["manifest"].items():
        console.print(f"{key}: {escape(_short(old))} → {escape(_short(new))}", highlight=False)
    files = found["files"]
    table = Table("file", "change", title="files")
    for path in files["added"]:
        table.add_row(escape(path), "[green]added[/]")
    for path in files["removed"]:
        table.add_row(escape(path), "[red]removed[/]")
    for path, (old, new) in files["changed"].items():
        table.add_row(escape(path), f"{old:,} → {new:,} bytes")
    console.print(table)
    table = Table(
        "dictionary", "status", "features matched", "median cosine", "labels changed", title="dictionaries"
    )
    for name, change in found["dictionaries"].items():
        table.add_row(escape(name), *_dictionary_row(change))
    console.print(table)


def _dictionary_row(change: dict[str, Any]) -> tuple[str, str, str, str]:
    sizes = ", ".join(f"{key} {old} → {new}" for key, (old, new) in change.get("sizes", {}).items())
    features, labels = change.get("features", {}), change.get("labels")
    status = change["status"] + (f" ({sizes})" if sizes else "")
    if isinstance(features, str):
        return status, features, "", ""
    matched = f"{features['matched']:,} of {features['compared']:,}" if features else ""
    median = features.get("median_cosine")
    moved = "" if labels is None else f"{labels['changed']:,} of {labels['of']:,}"
    return status, matched, "" if median is None else f"{median:.3f}", moved


def _short(value: object, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@commands.command("export-dictionary")
def export_dictionary(
    bundle: BundlePath,
    name: Annotated[str, typer.Argument(help="Dictionary of the bundle; '' is its default.")],
    out: Annotated[
        Path, typer.Argument(help="Folder; gets `image` and `text`, each with cfg.json and weights.")
    ],
) -> None:
    """Write a dictionary in SAELens's format, one autoencoder a modality."""
    with _explained():
        loaded = _load(bundle)
        from services.dictionaries.saelens import write_saelens

        for folder in write_saelens(loaded.dictionary(name), out, model_name=loaded.id):
            typer.echo(f"wrote {folder}")


@commands.command("export-pipeline")
def export_pipeline(
    bundle: BundlePath,
    out: Annotated[Path, typer.Argument(help="Folder to be made, in diffusers' layout.")],
) -> None:
    """Write the text-to-image pipeline as a folder that diffusers runs without the service."""
    with _explained():
        loaded = _load(bundle)
        from services.imaging.stock import write_stock_pipeline

        typer.echo(f"wrote {write_stock_pipeline(loaded, out)}")


@commands.command("import-dictionary")
def import_dictionary(
    bundle: BundlePath,
    name: Annotated[str, typer.Argument(help="What the dictionary is to be called in the bundle.")],
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with cfg.json and sae_weights.safetensors, or `image` and `text` of such."
        ),
    ],
) -> None:
    """Put a dictionary in SAELens's format into a bundle, whose id changes by it.

    It must have been trained on unit embeddings of the bundle's own towers: nothing in the format says so.
    """
    with _explained():
        from services.bundle.edit import add_dictionary
        from services.dictionaries.saelens import read_saelens

        made, kept = add_dictionary(
            bundle, name, read_saelens(folder), {"recipe": "saelens", "source": folder.name}
        )
    typer.echo(f"{made.id}: {name} with {made.manifest.dictionaries[name].n_features:,} features")
    if kept is not None:
        typer.echo(f"cosine of the bundle's probe with its reconstruction: {kept:.3f} (1 is perfect)")
