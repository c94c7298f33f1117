"""What is given on the command line: files, folders and texts, and the options that commands share for them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from monofacet import _exceptions as exceptions
from monofacet._inputs import Input

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Inputs = Annotated[
    list[str] | None,
    typer.Argument(help="Image files, folders of images, texts; - reads texts from standard input."),
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text, whatever it looks like.")]
Truncate = Annotated[bool, typer.Option(help="Cut long texts instead of refusing them.")]


def read_inputs(arguments: Iterable[str], texts: Iterable[str]) -> list[tuple[str, Input]]:
    """Tell images from texts.

    Parameters
    ----------
    arguments
        Each an image file, a folder of images, ``-`` for texts on standard input, one a line, or a text. What
        ends like an image file is one, so that a misspelt name is an error and not a text.
    texts
        Texts whatever they look like.

    Returns
    -------
    list of tuple
        Label and input, in order.

    Raises
    ------
    InputError
        If an argument is empty, a file is missing, a folder holds no images, or there is nothing at all.
    """
    inputs: list[tuple[str, Input]] = []
    for argument in arguments:
        # As a path it would be the working directory, with all images below it: a variable that is not set.
        if not argument:
            raise exceptions.InputError("an input is empty")
        path = Path(argument)
        if argument == "-":
            # Windows writes a byte order mark before the first line.
            lines = (line.rstrip("\r\n") for line in sys.stdin.read().removeprefix("\ufeff").split("\n"))
            inputs.extend((line, line) for line in lines if line)
        elif _is_directory(path):
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not images:
                raise exceptions.InputError(f"{argument} holds no {', '.join(SUFFIXES)} files")
            inputs.extend((str(image), image) for image in images)
        elif _is_file(path):
            inputs.append((argument, path))
        elif path.suffix.lower() in SUFFIXES:
            raise exceptions.InputError(f"no such file: {argument} (use --text if it is a text)")
        else:
            inputs.append((argument, argument))
    inputs.extend((text, text) for text in texts)
    if not inputs:
        raise exceptions.InputError("nothing to do: give image files, folders or texts")
    return inputs


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A long text is no valid file name.
        return False


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def shorten(label: str, width: int = 40) -> str:
    """Cut a label for a table.

    Parameters
    ----------
    label
        A path or a text.
    width
        Characters at most.

    Returns
    -------
    str
        Its end for a path, its start for a text.
    """
    if len(label) <= width:
        return label
    return "…" + label[1 - width :] if label.lower().endswith(SUFFIXES) else label[: width - 1] + "…"
