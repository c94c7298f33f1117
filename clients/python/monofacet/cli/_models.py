"""``monofacet models`` and ``monofacet health``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from monofacet._base import SERVICES
from monofacet._types import Model
from monofacet.cli._session import NOT_AVAILABLE, Session, connected, print_json


@connected
def models(
    session: Session,
    bundle: Annotated[
        str | None, typer.Argument(help="Id or name of a bundle: show it alone, with its files.")
    ] = None,
) -> None:
    """Show what the server serves: bundles, towers, dictionaries, what they run on, and every limit."""
    alone = bundle or session.client.bundle
    found = (session.client.model(alone),) if alone else session.client.models()
    if session.as_json:
        print_json({"models": found})
        return
    for model in found:
        _show(session, model)


def _show(session: Session, model: Model) -> None:
    default = ", the default" if model.is_default else ""
    facts = Table(show_header=False, title=f"{model.bundle} (server {model.server_version}{default})")
    tower, runtime = model.tower, model.runtime
    facts.add_row("description", model.description)
    facts.add_row("licences", ", ".join(model.licences))
    facts.add_row("tower", f"{tower.architecture}, {tower.parameters / 1e6:.1f} M parameters")
    facts.add_row("takes", f"{tower.image_size} x {tower.image_size} pixels, {tower.context_length} tokens")
    facts.add_row("gives", f"{tower.embed_dim} dimensions")
    facts.add_row(
        "runs on",
        f"{runtime.backend} {runtime.precision}, {runtime.device}, {runtime.replicas} x {runtime.threads} threads",
    )
    pipeline = model.pipeline
    if pipeline is not None:
        ways = ", ".join(pipeline.paths) or ("none" if pipeline.ready else "loading")
        facts.add_row(
            "draws",
            f"{pipeline.width} x {pipeline.height} pixels in {pipeline.num_inference_steps} steps, "
            f"{pipeline.kind}; steered by: {ways}",
        )
    facts.add_row("sha256", model.sha256)
    session.console.print(facts)

    dictionaries = Table("dictionary", "kind", "features", "L0", "modality", "cards", "default")
    for item in model.dictionaries:
        dictionaries.add_row(
            item.name,
            item.kind,
            f"{item.n_features:,}",
            "" if item.l0 is None else f"{item.l0:.1f}",
            *("yes" if flag else "" for flag in (item.has_modality, item.has_cards, item.is_default)),
        )
    session.console.print(dictionaries)

    limits = Table("limit", "value")
    for field in dataclasses.fields(model.limits):
        value = getattr(model.limits, field.name)
        limits.add_row(
            field.name, ", ".join(value) if isinstance(value, tuple) else f"{value:,}".removesuffix(".0")
        )
    session.console.print(limits)
    if model.files:
        files = Table("file", "sha256")
        for path, digest in model.files.items():
            files.add_row(path, digest)
        session.console.print(files)


@connected
def health(
    session: Session,
    service: Annotated[
        list[str] | None, typer.Argument(help="Full names of services. Default: all of the contract.")
    ] = None,
) -> None:
    """Ask whether the server is ready. The exit code is 0 if all services serve, else 4."""
    asked = {} if session.timeout is None else {"timeout": session.timeout}
    states = {name: session.client.health(name, **asked) for name in service or SERVICES}
    if session.as_json:
        print_json(states)
    else:
        table = Table("service", "state")
        for name, state in states.items():
            table.add_row(name or "(server)", f"[{'green' if state == 'SERVING' else 'red'}]{state}[/]")
        session.console.print(table)
    if any(state != "SERVING" for state in states.values()):
        raise typer.Exit(NOT_AVAILABLE)
