"""Where a command writes its file: to a path, or with ``-`` to standard output."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from monofacet import _exceptions as exceptions
from monofacet.cli._session import Session

STDOUT = Path("-")


def check_out(session: Session, out: Path | None, *, is_text: bool = False) -> None:
    """Find out before any work is done whether the file can be written; for ``-`` leave standard output to it.

    Parameters
    ----------
    session
        Its tables go to standard error from now on if the file takes standard output.
    out
        As given; None for no file.
    is_text
        Whether a terminal can show it.

    Raises
    ------
    InputError
        If its folder is missing, or standard output is a terminal or taken by ``--json``.
    """
    if out is None:
        return
    if out != STDOUT:
        if not out.parent.is_dir():
            raise exceptions.InputError(f"there is no folder {out.parent}")
        return
    if session.as_json:
        raise exceptions.InputError("--json and the file - both want standard output: give one of them")
    if not is_text and sys.stdout.isatty():
        raise exceptions.InputError(
            "a terminal cannot show the file: name one, or send standard output to a program"
        )
    session.console = session.progress


def check_folder(folder: Path | None) -> None:
    """Refuse ``-`` for a folder, before any work is done.

    Parameters
    ----------
    folder
        As given; None for none.

    Raises
    ------
    InputError
        If it is ``-``: standard output takes one file.
    """
    if folder == STDOUT:
        raise exceptions.InputError("standard output takes one file, and no folder")


def write_out(out: Path, data: bytes) -> None:
    """Write the file.

    Parameters
    ----------
    out
        As checked.
    data
        Its whole content.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    try:
        if out == STDOUT:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            out.write_bytes(data)
    except BrokenPipeError:
        # Whoever read it has seen enough; see `connected`.
        raise
    except OSError as error:
        raise exceptions.InputError(f"cannot write {out}: {error.strerror}") from error


def write_arrays(out: Path, arrays: dict[str, Any]) -> None:
    """Write arrays as an .npz file.

    Parameters
    ----------
    out
        As checked; a path gets the suffix if it lacks it, as by `numpy.savez`.
    arrays
        By name.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    named = out == STDOUT or out.name.endswith(".npz")
    write_out(out if named else out.with_name(f"{out.name}.npz"), buffer.getvalue())
