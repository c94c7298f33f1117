"""``monofacet filter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from monofacet import _exceptions as exceptions
from monofacet._types import FilteredImage, FilterResult, Verdict
from monofacet.cli._inputs import read_inputs, shorten
from monofacet.cli._out import check_out, write_arrays
from monofacet.cli._session import Session, connected, print_json

COLOURS = {Verdict.CLEAN: "green", Verdict.ADVERSARIAL: "red"}


@connected
def filter_images(
    session: Session,
    images: Annotated[list[str], typer.Argument(help="Image files and folders of images.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", help="What the images may show, twice or more. Default: the bundle's labels."
        ),
    ] = None,
    second_look: Annotated[
        bool,
        typer.Option(help="Also encode each picture smoothed: the best evidence, for a second forward."),
    ] = False,
    mode: Annotated[
        str | None, typer.Option(help="drop, keep_normal or restore. Default: the bundle's choice.")
    ] = None,
    keep_residual: Annotated[
        bool | None,
        typer.Option(
            "--keep-residual/--drop-residual",
            help="Whether what no feature explains is kept. Default: the bundle's choice.",
        ),
    ] = None,
    filter_all: Annotated[bool, typer.Option("--all", help="Filter clean images, too.")] = False,
    top: Annotated[int, typer.Option(min=0, max=1000, help="Suspicious features listed an image.")] = 5,
    truncate: Annotated[bool, typer.Option(help="Cut long labels instead of refusing them.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write ids, verdicts, scores and both embeddings to this .npz file; - for standard output."
        ),
    ] = None,
) -> None:
    """Tell adversarial images from clean ones, and filter what an attack moved out of their embeddings.

    CLEAN means that nothing was found; an attacker who knows the defense can see to that.
    """
    check_out(session, out)
    labelled = read_inputs(images, ())
    texts = [value for _, value in labelled if isinstance(value, str)]
    if texts:
        raise exceptions.InputError(f"no such image: {shorten(texts[0])}")
    result = session.client.filter_adversarial(
        [value for _, value in labelled],
        labels=label or (),
        mode=mode,
        keep_residual=keep_residual,
        second_look=second_look,
        filter_all=filter_all,
        max_features=top,
        truncate=truncate,
    )
    names = [name for name, _ in labelled]
    if out is not None:
        _save(out, names, result)
    if session.as_json:
        print_json({"images": names, "result": result})
    else:
        _show(session, names, result)


def _show(session: Session, names: list[str], result: FilterResult) -> None:
    table = Table(
        "image", "verdict", "score", "p", "label", "after filtering", "suspicious features",
        title=f"{result.dictionary}, at {result.false_positive_rate:.1%} false positives, {result.mode.lower()}",
    )  # fmt: skip
    for name, image in zip(names, result.images, strict=True):
        before, after = image.label_before, image.label_after
        table.add_row(
            escape(shorten(name, 30)),
            f"[{COLOURS[image.verdict]}]{image.verdict}[/]",
            f"{image.score:.2f} (from {image.threshold:.2f})",
            f"{image.p_value:.3f}",
            escape(f"{before.text} {before.probability:.0%}"),
            escape(f"{after.text} {after.probability:.0%}") if image.filtered else "",
            escape(_features(image)),
        )
    session.console.print(table)
    flagged = sum(image.adversarial for image in result.images)
    session.console.print(f"{flagged} of {len(result)} images are called adversarial")


def _features(image: FilteredImage) -> str:
    listed = [
        f"{item.feature} {item.name} {item.activation:.2f}→{item.filtered:.2f} "
        f"{','.join(reason.lower() for reason in item.reasons)}"
        for item in image.features
    ]
    more = image.suspicious_features - len(listed)
    return "; ".join([*listed, f"and {more} more"] if more else listed)


def _save(path: Path, names: list[str], result: FilterResult) -> None:
    arrays = {
        "ids": np.array(names),
        "adversarial": np.array([image.adversarial for image in result.images]),
        "scores": np.array([image.score for image in result.images], np.float32),
        "before": np.stack([image.before for image in result.images]),
        "after": np.stack([image.after for image in result.images]),
    }
    write_arrays(path, arrays)
