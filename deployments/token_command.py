"""The `monofacet token` command: make a bearer token."""

from __future__ import annotations

from typing import Annotated

import typer


def token(
    name: Annotated[str, typer.Argument(help="Whose it is; limits and logs go by it.")],
    scopes: Annotated[str, typer.Option(help="read, generate, admin; joined by commas.")] = "read",
    expires: Annotated[str, typer.Option(help="never, 2027-01-31 or 2027-01-31T12:00:00Z; UTC.")] = "never",
) -> None:
    """Print a new token, once, and the line that admits it.

    The line goes into the file of --tokens-file, or into the variable MONOFACET_TOKENS. It holds the token's
    hash, from which the token cannot be had.
    """
    from deployments.access.tokens import new_token, parse_expiry, parse_scopes, parse_tokens

    try:
        made, line = new_token(name, parse_scopes(scopes), parse_expiry(expires))
        parse_tokens(line)
    except ValueError as error:
        typer.echo(f"monofacet: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo("Give this to its holder; it is shown only now:", err=True)
    typer.echo(made)
    typer.echo("Add this line to the tokens file:", err=True)
    typer.echo(line)
