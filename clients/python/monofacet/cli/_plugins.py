"""Commands of other packages: the entry points of group ``monofacet.commands``.

A package that installs ``serve = "deployments.serve:serve"`` there adds ``monofacet serve``. The entry point
is a function with typer's annotations, or a `typer.Typer`; its name is the command's.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import typer
import typer.main

GROUP = "monofacet.commands"

NO_SERVER = """\
The server is not installed: this is the client alone.
In a clone of the repository: pip install -e './clients/python' -e '.[server]'"""


def add_plugins(app: typer.Typer) -> None:
    """Add a command for each entry point, and one for ``serve`` that says how to get it if nothing brings it.

    Parameters
    ----------
    app
        The ``monofacet`` command.
    """
    taken = {command.name for command in app.registered_commands}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        # A plugin adds; it does not replace what the documentation describes.
        if entry.name not in taken:
            _add(app, entry)
            taken.add(entry.name)
    if "serve" not in taken:

        @app.command("serve")
        def serve() -> None:
            """Start a server (not installed)."""
            typer.echo(NO_SERVER, err=True)
            raise typer.Exit(1)


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    origin = entry.dist.name if entry.dist is not None else entry.value
    summary = "Start a server." if entry.name == "serve" else f"Added by {origin}."

    # Loaded when it is called: the server's modules take seconds to import, and `encode` needs none of them.
    # All arguments, --help included, belong to the plugin's own command.
    @app.command(
        entry.name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def run(context: typer.Context) -> None:
        try:
            loaded = entry.load()
        except ImportError as error:
            typer.echo(f"`monofacet {entry.name}` of {origin} cannot be loaded: {error}", err=True)
            raise typer.Exit(1) from error
        if not isinstance(loaded, typer.Typer):
            function, loaded = loaded, typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
            loaded.command()(function)
        command = typer.main.get_command(loaded)
        command.main(args=list(context.args), prog_name=f"monofacet {entry.name}")
