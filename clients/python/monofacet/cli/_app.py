"""Puts the commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from monofacet._version import __version__
from monofacet.cli import (
    _attributes,
    _encode,
    _features,
    _filter,
    _gender,
    _generate,
    _modality,
    _models,
    _preview,
)
from monofacet.cli._plugins import add_plugins
from monofacet.cli._session import settle_streams

app = typer.Typer(
    name="monofacet",
    help="Embeddings, sparse features and modality of images and texts, from a Monofacet server.",
    no_args_is_help=True,
    # A traceback with local variables would print tokens and whole images.
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"monofacet {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Embeddings, sparse features and modality of images and texts, from a Monofacet server."""


app.command("encode")(_encode.encode)
app.command("features")(_features.features)
app.command("modality")(_modality.modality)
app.command("filter")(_filter.filter_images)
app.command("generate")(_generate.generate)
app.command("preview")(_preview.preview)
app.command("attributes")(_attributes.attributes)
app.command("models")(_models.models)
app.command("health")(_models.health)
app.add_typer(_gender.app)
add_plugins(app)


def main() -> None:
    """Run the command line."""
    settle_streams()
    app()
