"""``monofacet modality``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from monofacet import _exceptions as exceptions
from monofacet._inputs import Pair
from monofacet._tables import Row, TableError, help_text, picture_folder, read_csv, texts_of
from monofacet._types import ClassificationResult, FeatureCard, ModalityLabel, ModalityTable, ScoreSettings
from monofacet.cli._features import COLOURS, card_table
from monofacet.cli._inputs import Inputs, Texts, Truncate, read_inputs, shorten
from monofacet.cli._out import check_out, write_out
from monofacet.cli._session import Session, connected, print_json


@connected
def modality(
    session: Session,
    inputs: Inputs = None,
    text: Texts = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with columns for image, text and optionally group: score the features on its pairs. "
            f"{help_text('image', 'text', 'group')}."
        ),
    ] = None,
    dictionary: Annotated[str, typer.Option(help="Dictionary; '' is the default one.")] = "",
    top: Annotated[int, typer.Option(min=0, max=100, help="Features listed an input.")] = 5,
    truncate: Truncate = False,
    delta: Annotated[float | None, typer.Option(help="Half the band around 0.5 that counts as both.")] = None,
    bootstrap: Annotated[int | None, typer.Option(help="Bootstrap samples over pairs.")] = None,
    shuffles: Annotated[int | None, typer.Option(help="Shuffles for the p-value of co-activation.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of both.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --pairs: write the table to this CSV file; - for standard output."),
    ] = None,
) -> None:
    """Tell whether inputs activate features about images, texts or both; or score features on your own pairs."""
    if pairs is not None:
        if inputs or text:
            raise exceptions.InputError("give either inputs or --pairs")
        settings = ScoreSettings(
            dictionary=dictionary,
            delta=delta,
            bootstrap_samples=bootstrap,
            shuffles=shuffles,
            seed=seed,
            truncate_text=truncate,
        )
        check_out(session, out, is_text=True)
        _score(session, pairs, settings, out)
        return
    labelled = read_inputs(inputs or (), text or ())
    result = session.client.classify_modality(
        [value for _, value in labelled], dictionary=dictionary, top_features=top, truncate=truncate
    )
    labels = [label for label, _ in labelled]
    if session.as_json:
        print_json({"inputs": labels, "result": result})
    else:
        _show_classification(session, labels, result)


def _show_classification(session: Session, labels: list[str], result: ClassificationResult) -> None:
    table = Table(
        "input", *ModalityLabel, "strongest features", title=f"energy by label, {result.dictionary}"
    )
    for label, item in zip(labels, result.classifications, strict=True):
        strongest = [f"{feature.feature} {feature.name} {feature.share:.0%}" for feature in item.top_features]
        shares = [
            f"[{COLOURS[kind]}]{item.shares[kind]:.0%}[/]" if item.shares[kind] else ""
            for kind in ModalityLabel
        ]
        table.add_row(escape(shorten(label, 30)), *shares, escape("; ".join(strongest)))
    session.console.print(table)


def _score(session: Session, path: Path, settings: ScoreSettings, out: Path | None) -> None:
    rows = _read_pairs(path)
    stream = track(rows, "sending pairs", console=session.progress, transient=True, disable=session.as_json)
    table = session.client.score_modality(stream, settings)
    if out is not None:
        _write_table(out, table)
    if session.as_json:
        print_json(table)
        return
    counts = Table("label", "features", title=f"{table.settings.dictionary}, {table.pairs} pairs")
    for label, count in table.counts().items():
        counts.add_row(f"[{COLOURS[label]}]{label}[/]", str(count))
    session.console.print(counts)
    session.progress.print(
        "Shares of labels describe the dictionary: another one splits the same towers otherwise."
    )
    cross = [card for card in table.cards if card.label == ModalityLabel.CROSS]
    if cross:
        cross.sort(key=lambda card: -(card.coactivation or 0))
        session.console.print(card_table(cross[:10], "features about both, by co-activation"))


def _read_pairs(path: Path) -> list[Pair]:
    try:
        table = read_csv(path, ("image", "text", "group"))
        table.need("image", "text")
    except TableError as error:
        raise exceptions.InputError(str(error)) from error
    # Paths are relative to the file that names them, so that it can be moved with its images.
    folder = picture_folder(path.parent, [row.cells.get("image", "") for row in table.rows])
    pairs = [pair for row in table.rows for pair in _pairs(path, folder, row)]
    if not pairs:
        raise exceptions.InputError(f"{path} holds no pairs")
    return pairs


def _pairs(path: Path, folder: Path, row: Row) -> list[Pair]:
    image, text = row.cells.get("image"), row.cells.get("text")
    # A text may be empty; one that is None is of a row with too few cells.
    if row.problem or not image or text is None:
        problem = row.problem or f"no {'text' if image else 'image'}"
        raise exceptions.InputError(f"{path}, line {row.line}: {problem}")
    return [(folder / image, one, row.cells.get("group", "")) for one in texts_of(text) or [""]]


def _write_table(path: Path, table: ModalityTable) -> None:
    def rows() -> Iterator[dict[str, object]]:
        for card in table.cards:
            yield {name: getattr(card, name) for name in FeatureCard.__dataclass_fields__}

    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(FeatureCard.__dataclass_fields__))
    writer.writeheader()
    writer.writerows(rows())
    write_out(path, file.getvalue().encode())
