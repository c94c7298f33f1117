"""Commands of other packages: the entry points of group ``monofacet.commands``.

A package that installs ``serve = "deployments.serve:serve"`` there adds ``monofacet serve``. The entry point
is a function with typer's annotations, or a `typer.Typer`; its name is the command's. A `typer.Typer` gets
further commands from the entry points of ``monofacet.commands.NAME``.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import typer
import typer.main

GROUP = "monofacet.commands"

NO_SERVER = """\
The server is not installed: this is the client alone.
In a clone of the repository: pip install -e './clients/python' -e '.[server]'"""

# What training needs besides is an extra of its own.
EVERYTHING = (
    "For Monofacet's own, in a clone of the repository: make setup, or pip install -e '.[server,train]'"
)


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
            raise _missing(f"monofacet {entry.name}", error) from error
        if isinstance(loaded, typer.Typer):
            _add_commands(loaded, entry.name)
        else:
            function, loaded = loaded, typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
            loaded.command()(function)
        command = typer.main.get_command(loaded)
        try:
            command.main(args=list(context.args), prog_name=f"monofacet {entry.name}")
        except ModuleNotFoundError as error:
            # Of what is imported only once it is needed.
            raise _missing(f"monofacet {entry.name}", error) from error


def _add_commands(group: typer.Typer, name: str) -> None:
    """Add what other packages bring to a group of commands."""
    for entry in sorted(entry_points(group=f"{GROUP}.{name}"), key=lambda entry: entry.name):
        try:
            group.command(entry.name)(entry.load())
        except ImportError as error:
            _add_missing(group, name, entry.name, error)


def _add_missing(group: typer.Typer, name: str, command: str, error: ImportError) -> None:
    """Add a command that says what it needs."""

    @group.command(
        command,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def run(context: typer.Context) -> None:
        """Need packages that are not installed."""
        raise _missing(f"monofacet {name} {command}", error) from error


def _missing(command: str, error: ImportError) -> typer.Exit:
    """Say in one line what a command needs."""
    typer.echo(f"`{command}` needs what is not installed: {error}. {EVERYTHING}", err=True)
    return typer.Exit(1)
