"""``monofacet encode``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from monofacet import _exceptions as exceptions
from monofacet._types import StreamResult
from monofacet.cli._inputs import Inputs, Texts, Truncate, read_inputs, shorten
from monofacet.cli._out import check_out, write_arrays
from monofacet.cli._session import BAD_INPUT, Session, connected, error_as_dict, print_json

# A similarity table of more does not fit a screen.
MAX_SIMILARITIES = 8


@connected
def encode(
    session: Session,
    inputs: Inputs = None,
    text: Texts = None,
    dictionary: Annotated[
        str | None, typer.Option(help="Dictionary whose features are wanted; '' is the default one.")
    ] = None,
    max_features: Annotated[
        int | None, typer.Option("--top", min=1, help="Keep only this many features an input.")
    ] = None,
    truncate: Truncate = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write ids, embeddings, norms and features to this .npz file; - for standard output."
        ),
    ] = None,
) -> None:
    """Encode images and texts to embeddings, and to sparse features if a dictionary is named.

    With --json one line an input. A bad input does not stop the others; the exit code is then 3.
    """
    labelled = read_inputs(inputs or (), text or ())
    check_out(session, out)
    # Ids are positions: a text may be longer than an id, and given twice.
    stream = session.client.stream_encode(
        [value for _, value in labelled], dictionary=dictionary, max_features=max_features, truncate=truncate
    )
    results = []
    for result in track(
        stream,
        "encoding",
        total=len(labelled),
        console=session.progress,
        transient=True,
        disable=session.as_json or len(labelled) == 1,
    ):
        result = dataclasses.replace(result, id=labelled[int(result.id)][0])
        # Printed as it comes, so that a program can start on the first.
        if session.as_json:
            print_json(_as_dict(result))
        results.append(result)
    if not session.as_json:
        _show(session, results)
    if out is not None:
        _save(out, [result for result in results if result.ok])
    bad = sum(not result.ok for result in results)
    if bad:
        session.progress.print(f"{bad} of {len(results)} inputs are bad")
        raise typer.Exit(BAD_INPUT)


def _as_dict(result: StreamResult) -> dict[str, Any]:
    if result.error is not None:
        return {"id": result.id, "error": error_as_dict(result.error)}
    return {
        "id": result.id,
        "embedding": result.embedding,
        "norm": result.norm,
        "features": result.features,
        "bundle": result.bundle,
    }


def _show(session: Session, results: list[StreamResult]) -> None:
    table = Table("input", "norm", "embedding", "features", highlight=True)
    for result in results:
        if result.error is not None:
            message = _reason(result.error)
            table.add_row(escape(shorten(result.id)), "", f"[red]{escape(message)}[/]", "")
            continue
        head = " ".join(f"{value:+.3f}" for value in result.embedding[:4])
        active = ""
        if result.features is not None:
            pairs = zip(result.features.indices[:4], result.features.values[:4], strict=True)
            active = f"{len(result.features)}: " + " ".join(f"{index}={value:.2f}" for index, value in pairs)
        table.add_row(
            escape(shorten(result.id)), f"{result.norm:.2f}", f"{head} … ({len(result.embedding)})", active
        )
    session.console.print(table)
    good = [result for result in results if result.ok]
    if 2 <= len(good) <= MAX_SIMILARITIES:
        embeddings = np.stack([result.embedding for result in good])
        cosines = Table("cosine", *(str(position) for position in range(1, len(good) + 1)))
        for position, (result, row) in enumerate(zip(good, embeddings @ embeddings.T, strict=True), start=1):
            cosines.add_row(
                f"{position} {escape(shorten(result.id, 30))}", *(f"{value:.2f}" for value in row)
            )
        session.console.print(cosines)


def _reason(error: exceptions.MonofacetError) -> str:
    if isinstance(error, exceptions.CallError):
        return "; ".join(violation.description for violation in error.violations) or error.message
    return str(error)


def _save(path: Path, results: list[StreamResult]) -> None:
    arrays: dict[str, Any] = {
        "ids": np.array([result.id for result in results]),
        "embeddings": np.stack([result.embedding for result in results]) if results else np.zeros((0, 0)),
        "norms": np.array([result.norm for result in results], dtype=np.float32),
    }
    features = [result.features for result in results if result.features is not None]
    if features:
        # As a compressed sparse row matrix: scipy.sparse.csr_array((values, indices, indptr)).
        arrays["indptr"] = np.cumsum([0, *(len(item) for item in features)])
        arrays["indices"] = np.concatenate([item.indices for item in features])
        arrays["values"] = np.concatenate([item.values for item in features])
    write_arrays(path, arrays)
