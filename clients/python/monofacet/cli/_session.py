"""What every command has: the connection's options, ``--json``, and errors that help."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import PIL.Image
import rich.console
import typer
from rich.markup import escape

from monofacet import _exceptions as exceptions
from monofacet._client import Client
from monofacet._config import TLS, Timeout

FAILED, BAD_INPUT, NOT_AVAILABLE, NOT_ALLOWED, INTERRUPTED = 1, 3, 4, 5, 130
# As of a program that SIGPIPE ended: `monofacet encode pictures/ --json | head -1`.
PIPE_CLOSED = 141

EXIT_CODES: tuple[tuple[type[exceptions.MonofacetError], int], ...] = (
    (exceptions.InputError, BAD_INPUT),
    (exceptions.InvalidInputError, BAD_INPUT),
    (exceptions.NotFoundError, BAD_INPUT),
    (exceptions.UnavailableError, NOT_AVAILABLE),
    (exceptions.OverloadedError, NOT_AVAILABLE),
    (exceptions.DeadlineError, NOT_AVAILABLE),
    (exceptions.AuthenticationError, NOT_ALLOWED),
)

Target = Annotated[
    str, typer.Option("--target", envvar="MONOFACET_TARGET", help="Where the server is, as host:port.")
]
Token = Annotated[
    str | None, typer.Option("--token", envvar="MONOFACET_TOKEN", help="Token that the server asks for.")
]
Encrypt = Annotated[
    bool | None,
    typer.Option(
        "--tls/--no-tls",
        envvar="MONOFACET_TLS",
        help="Whether to encrypt. Default: no, unless --ca is given.",
    ),
]
Authority = Annotated[
    Path | None, typer.Option("--ca", envvar="MONOFACET_CA", help="PEM file of certificates to trust.")
]
Certificate = Annotated[
    Path | None, typer.Option("--cert", envvar="MONOFACET_CERT", help="PEM file of your certificate (mTLS).")
]
Key = Annotated[
    Path | None, typer.Option("--key", envvar="MONOFACET_KEY", help="PEM file of its private key.")
]
# No variable: MONOFACET_BUNDLE is the directory that a server serves.
Bundle = Annotated[
    str, typer.Option("--bundle", help="Name or id of the bundle that answers. Default: the server's own.")
]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--timeout", min=0.001, help="Seconds for each call. Default: 60; for a stream 3600, for health 5."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for programs.")]


@dataclasses.dataclass
class Session:
    """What a command works with.

    Attributes
    ----------
    client
        Connected when it is first used.
    timeout
        Seconds that were asked for; the client has them already, and `health`, which has its own, asks here.
    as_json
        Whether the output is for programs.
    console
        For people; standard output.
    progress
        For progress bars and notes; standard error.
    """

    client: Client
    timeout: float | None
    as_json: bool
    console: rich.console.Console
    progress: rich.console.Console


class Console(rich.console.Console):
    """A console that ends the command where its reader has gone."""

    def on_broken_pipe(self) -> None:
        """Leave in silence; rich leaves with 1, which says that the server failed."""
        leave_pipe()


def leave_pipe() -> NoReturn:
    """Leave in silence: whoever read the output has seen enough.

    Raises
    ------
    SystemExit
        With the code that a shell gives for SIGPIPE.
    """
    # What is still buffered would be written at the end, and fail once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(PIPE_CLOSED)


def settle_streams() -> None:
    """Show text that the terminal's encoding lacks as escapes, where Python would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files too, which may be no UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its session, and the options that the session takes.

    Parameters
    ----------
    command
        Its first parameter is a `Session`; the others are its own arguments and options.

    Returns
    -------
    callable
        With the connection's options appended to the command's, for `typer`.
    """

    @functools.wraps(command)
    def run(
        *,
        target: str,
        token: str | None,
        tls: bool | None,
        ca: Path | None,
        cert: Path | None,
        key: Path | None,
        timeout: float | None,
        served_bundle: str,
        as_json: bool,
        **own: Any,
    ) -> None:
        settle_streams()
        # gRPC's own notes on connections; what they mean for the call is reported here.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        keys = TLS(ca=ca, certificate=cert, key=key) if (ca or cert or key) and tls is not False else tls
        try:
            limits = Timeout() if timeout is None else Timeout(call=timeout, stream=timeout)
            with Client(target, token=token, tls=keys, timeout=limits, bundle=served_bundle) as client:
                out, err = Console(), Console(stderr=True)
                command(Session(client, timeout, as_json, out, err), **own)
        except exceptions.MonofacetError as error:
            fail(error, as_json, target)
        except BrokenPipeError:
            leave_pipe()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = {
        "target": (Target, "localhost:9000"),
        "token": (Token, None),
        "tls": (Encrypt, None),
        "ca": (Authority, None),
        "cert": (Certificate, None),
        "key": (Key, None),
        "timeout": (Seconds, None),
        "served_bundle": (Bundle, ""),
        "as_json": (AsJson, False),
    }
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in shared.items()
    ]
    arguments = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    run.__signature__ = inspect.Signature([*arguments, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*arguments, *options]}
    # Else inspect follows it to the command's own signature.
    del run.__wrapped__
    return run


def fail(error: exceptions.MonofacetError, as_json: bool, target: str) -> NoReturn:
    """Report an error and leave.

    Parameters
    ----------
    error
        What went wrong.
    as_json
        Whether to print it as JSON.
    target
        The server, for the advice.

    Raises
    ------
    typer.Exit
        With the error's exit code.
    """
    code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), FAILED)
    if as_json:
        print_json({"error": error_as_dict(error)}, sys.stderr)
    else:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        advice = _advice(error, target)
        if advice:
            console.print(f"[dim]{escape(advice)}[/]")
    raise typer.Exit(code)


def _advice(error: exceptions.MonofacetError, target: str) -> str:
    if isinstance(error, exceptions.UnavailableError):
        return f"Is a server running at {target}? `monofacet serve` starts one; --target chooses another."
    if isinstance(error, exceptions.OverloadedError):
        when = f"in {error.retry_after:.1f} s" if error.retry_after is not None else "later"
        return f"The server sheds load or a limit was passed; try again {when}. `monofacet models` shows the limits."
    if isinstance(error, exceptions.DeadlineError):
        return "A longer --timeout, or fewer inputs at once, may help."
    if isinstance(error, exceptions.AuthenticationError):
        return "The server asks for a token: --token, or the variable MONOFACET_TOKEN."
    if isinstance(error, exceptions.NotFoundError):
        return "`monofacet models` lists the bundles and dictionaries that this server has."
    return ""


def error_as_dict(error: exceptions.MonofacetError) -> dict[str, Any]:
    """Describe an error for programs.

    Parameters
    ----------
    error
        Of the server or of the client.

    Returns
    -------
    dict
        With kind and message, and for a call code, reason and violations.
    """
    if isinstance(error, exceptions.CallError):
        return {
            "kind": type(error).__name__,
            "message": error.message,
            "code": error.code,
            "reason": error.reason,
            "violations": [dataclasses.asdict(violation) for violation in error.violations],
            "retry_after": error.retry_after,
        }
    return {"kind": type(error).__name__, "message": str(error)}


def print_json(value: Any, file: Any = None) -> None:
    """Print one line of JSON.

    Parameters
    ----------
    value
        Dataclasses and arrays included.
    file
        Default standard output.
    """
    file = file or sys.stdout
    # In UTF-8 only a lone surrogate is escaped on the way, as \udcff, which is JSON. Other encodings lack characters,
    # and Python's escapes of those, such as \xe9, are not.
    is_utf8 = codecs.lookup(file.encoding or "ascii").name == "utf-8"
    print(json.dumps(value, default=_plain, ensure_ascii=not is_utf8, allow_nan=False), file=file, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PIL.Image.Image):
        return {"width": value.width, "height": value.height}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")
