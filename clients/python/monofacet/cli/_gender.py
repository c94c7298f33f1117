"""``monofacet gender``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from monofacet import _exceptions as exceptions
from monofacet._bias_requests import LabelledItem
from monofacet._inputs import image_bytes
from monofacet._tables import Row, TableError, gender_of, help_text, picture_folder, read_csv, texts_of
from monofacet._types import (
    Ablation,
    AblationMode,
    AuditSettings,
)
from monofacet.cli._gender_page import page
from monofacet.cli._gender_tables import show_audits, show_classes
from monofacet.cli._inputs import Inputs, Texts, Truncate, read_inputs
from monofacet.cli._out import STDOUT, check_out, write_out
from monofacet.cli._session import Session, connected, print_json

app = typer.Typer(
    name="gender",
    help="How gendered the towers see people, and what removing features does about it.",
    no_args_is_help=True,
)

Features = Annotated[
    str | None, typer.Option("--features", help="Remove these features: ids, separated by commas.")
]
Label = Annotated[
    str | None, typer.Option("--label", help="Remove all features of a label: image, text, cross.")
]
Top = Annotated[
    int | None, typer.Option("--top", min=1, help="Remove so many features, the most gendered ones first.")
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        help="zero, mean, project; or leace, which takes no features. Default: as the bundle recommends.",
    ),
]
Dictionary = Annotated[str, typer.Option(help="Dictionary; '' is the default one.")]


def chosen(
    features: str | None,
    label: str | None,
    top: int | None,
    mode: str | None,
    dictionary: str,
    recommended: Ablation | None,
) -> Ablation | None:
    """Make the ablation that the options say, and the bundle where they say nothing.

    Parameters
    ----------
    features, label, top, mode, dictionary
        As given.
    recommended
        By the bundle, or None.

    Returns
    -------
    Ablation or None
        None if nothing says what to remove.

    Raises
    ------
    InputError
        If the feature ids are no numbers.
    """
    if mode is not None and mode.lower() == "leace":
        return Ablation(_ids(features), label, top, mode, dictionary)
    if recommended is not None and recommended.mode == AblationMode.LEACE and mode is not None:
        # It takes no features, and so says nothing of those that another mode takes.
        recommended = None
    if features is None and label is None and top is None:
        if recommended is None or dictionary not in ("", recommended.dictionary):
            return None
        return dataclasses.replace(recommended, mode=mode or recommended.mode)
    return Ablation(_ids(features), label, top, mode or _mode(recommended), dictionary)


def _ids(features: str | None) -> list[int] | None:
    try:
        return None if features is None else [int(part) for part in features.split(",")]
    except ValueError as error:
        raise exceptions.InputError(
            f"--features takes numbers separated by commas, not {features!r}"
        ) from error


def _mode(recommended: Ablation | None) -> str:
    """Return the mode for features that were chosen by hand."""
    usable = recommended is not None and recommended.mode != AblationMode.LEACE
    return str(recommended.mode) if recommended is not None and usable else AblationMode.ZERO


@app.command("classify")
@connected
def classify(
    session: Session,
    inputs: Inputs = None,
    text: Texts = None,
    features: Features = None,
    label: Label = None,
    top: Top = None,
    mode: Mode = None,
    dictionary: Dictionary = "",
    nothing: Annotated[bool, typer.Option("--no-ablation", help="Remove nothing.")] = False,
    truncate: Truncate = False,
) -> None:
    """Tell how gendered each input is, before and after an ablation: by default the one that the bundle recommends.

    It measures what the towers do. Nobody's gender can be told from a picture.
    """
    labelled = read_inputs(inputs or (), text or ())
    recommended = None if nothing else session.client.model(session.client.bundle).recommended_ablation
    ablation = None if nothing else chosen(features, label, top, mode, dictionary, recommended)
    result = session.client.classify_gender(
        [value for _, value in labelled], ablation=ablation, truncate=truncate
    )
    names = [name for name, _ in labelled]
    if session.as_json:
        for name, item in zip(names, result.classifications, strict=True):
            fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
            print_json({"id": name, **fields, "ablation": result.ablation})
        return
    show_classes(session, names, result, recommended)


@app.command("audit")
@connected
def audit(
    session: Session,
    labels: Annotated[
        Path,
        typer.Option(
            "--csv",
            help="CSV file with columns for an image or a text, for gender, and optionally for profession and for "
            f"group: items that are not independent. {help_text('image', 'text', 'gender', 'profession', 'group')}.",
        ),
    ],
    features: Features = None,
    label: Label = None,
    top: Top = None,
    mode: Mode = None,
    dictionary: Dictionary = "",
    compare: Annotated[
        bool,
        typer.Option(help="Audit the labels that features have, the top 16 and 64, and LEACE side by side."),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option(help="Leave bad items out and name them, instead of failing.")
    ] = False,
    bootstrap: Annotated[
        int | None, typer.Option(min=100, max=10_000, help="Samples for the intervals.")
    ] = None,
    null_sets: Annotated[int | None, typer.Option(min=100, max=10_000, help="Random feature sets.")] = None,
    min_group: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Items of a gender that a profession needs to count.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.")] = None,
    truncate: Truncate = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with tables and plots here; - for standard output.")
    ] = None,
) -> None:
    """Audit what an ablation does to labelled inputs of your own; by default the one that the bundle recommends."""
    check_out(session, html, is_text=True)
    unreadable: list[str] = []
    rows = read_labels(labels, unreadable if skip_bad else None)
    recommended = session.client.model(session.client.bundle).recommended_ablation
    asked = chosen(features, label, top, mode, dictionary, recommended) or Ablation(
        top_gender_features=16, mode=mode or _mode(recommended), dictionary=dictionary
    )
    settings = AuditSettings(
        ablations=_present(session, compared(mode or _mode(recommended), dictionary))
        if compare
        else (asked,),
        skip_bad_items=skip_bad,
        bootstrap_samples=bootstrap,
        null_sets=null_sets,
        min_group=min_group,
        seed=seed,
        truncate_text=truncate,
    )
    items = track(
        _readable(rows, skip_bad, unreadable),
        "auditing",
        total=len(rows),
        console=session.progress,
        transient=True,
        disable=session.as_json,
    )
    result = session.client.audit_gender(items, settings)
    if html is not None:
        write_out(html, page(result).encode())
    if session.as_json:
        print_json(result)
    else:
        show_audits(session, result)
        if html is not None and html != STDOUT:
            session.progress.print(f"the page is {html}")
    for name in unreadable:
        session.progress.print(f"left out: {name}")


def compared(mode: str, dictionary: str) -> tuple[Ablation, ...]:
    """List the ablations of ``--compare``.

    Parameters
    ----------
    mode, dictionary
        Of those that use features.

    Returns
    -------
    tuple of Ablation
        The labels, two sizes, and LEACE.
    """
    mode = "zero" if mode.lower() == "leace" else mode
    by_label = [Ablation(label=name, mode=mode, dictionary=dictionary) for name in ("IMAGE", "TEXT", "CROSS")]
    by_rank = [Ablation(top_gender_features=q, mode=mode, dictionary=dictionary) for q in (16, 64)]
    return (*by_rank, *by_label, Ablation(mode="LEACE", dictionary=dictionary))


def _present(session: Session, ablations: tuple[Ablation, ...]) -> tuple[Ablation, ...]:
    """Leave out labels that no feature has, and say so: the server would refuse the whole audit."""
    kept = []
    for ablation in ablations:
        if ablation.label is not None and not _count(session, ablation):
            session.progress.print(f"left out: no feature is labelled {ablation.label}")
        else:
            kept.append(ablation)
    return tuple(kept)


def _count(session: Session, ablation: Ablation) -> int:
    labels = () if ablation.label is None else (ablation.label,)
    return session.client.features_page(page_size=1, dictionary=ablation.dictionary, labels=labels).total


def read_labels(path: Path, left_out: list[str] | None = None) -> list[LabelledItem]:
    """Read a CSV of labelled inputs.

    Parameters
    ----------
    path
        With columns for an image or a text, for gender, and optionally for profession and group, by any of their names
        in `monofacet._tables.COLUMNS`. Image paths are relative to the file, so that it can be moved with its images.
        Where a row has both, the image is taken.
    left_out
        Gets the rows that cannot be taken, with their lines; None raises for the first.

    Returns
    -------
    list of LabelledItem
        In order; images as paths, not read yet.

    Raises
    ------
    InputError
        If the file cannot be read, or a row has neither an image nor a text, an unknown gender, or cells that no column
        is for.
    """
    try:
        table = read_csv(path, ("image", "text", "gender", "profession", "group"))
        table.need("gender", "text" if "text" in table.columns else "image")
    except TableError as error:
        raise exceptions.InputError(str(error)) from error
    folder = picture_folder(path.parent, [row.cells.get("image", "") for row in table.rows])
    items: list[LabelledItem] = []
    for row in table.rows:
        try:
            items += _items(folder, row)
        except TableError as error:
            message = f"{path}, line {row.line}: {error}"
            if left_out is None:
                raise exceptions.InputError(message) from error
            left_out.append(message)
    if not items:
        raise exceptions.InputError(f"{path} holds no items")
    return items


def _items(folder: Path, row: Row) -> list[LabelledItem]:
    if row.problem:
        raise TableError(row.problem)
    image, texts = row.cells.get("image", ""), texts_of(row.cells.get("text", ""))
    if not image and not texts:
        raise TableError("neither an image nor a text")
    return [
        LabelledItem(
            input=folder / image if image else text,
            gender=gender_of(row.cells.get("gender", "")),
            profession=row.cells.get("profession", ""),
            cluster=row.cells.get("group", ""),
            id=(image or text)[:256],
        )
        for text in (texts[:1] if image else texts) or [""]
    ]


def _readable(items: list[LabelledItem], skip: bool, unreadable: list[str]) -> Iterator[LabelledItem]:
    for item in items:
        if isinstance(item.input, Path):
            try:
                item = dataclasses.replace(item, input=image_bytes(item.input))
            except exceptions.InputError as error:
                if not skip:
                    raise
                unreadable.append(str(error))
                continue
        yield item
