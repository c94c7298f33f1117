"""Reading safetensors: the one place that opens them, and says what is wrong with a file that is none.

Weights come by downloads that stop half-way, by clones without git-lfs and from mirrors that answer with a page. What
lies there instead is told by its first bytes, in one line that names the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors
from safetensors import SafetensorError

from services.errors import BundleFileError

_LENGTH = struct.Struct("<Q")
# Tensors that are named where weights do not fit; a wall of names says no more.
_NAMED = 3
# The first bytes of what people find in the place of weights, and what to do about it.
_LOOK_ALIKES = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository",
    ),
    (b"<", "is a web page, not weights: the download was refused or redirected; download it again"),
    (b"{", "is JSON, not weights: probably a server's error message; download it again"),
    (
        b"PK\x03\x04",
        "is a pickle of PyTorch under another name, which is never read: convert it to safetensors",
    ),
    (b"\x80", "is a pickle under another name, which is never read: convert it to safetensors"),
    (b"GGUF", "is a GGUF file under another name, not safetensors"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
)


@contextmanager
def open_weights(path: Path, framework: Literal["numpy", "pt"] = "numpy") -> Iterator[Any]:
    """Open a safetensors file, as `safetensors.safe_open`.

    The header is checked when it is opened: every tensor lies within the file and is as long as its shape and type
    say, so that nothing larger than the file is ever allocated.

    Parameters
    ----------
    path : Path
        The file.
    framework : {"numpy", "pt"}
        Whose tensors are returned.

    Raises
    ------
    BundleFileError
        Where it is not such a file, in one line that names it and the likely cause.
    """
    try:
        file = safetensors.safe_open(str(path), framework=framework)
    except (OSError, SafetensorError) as error:
        raise BundleFileError(*_explained(path, error)) from error
    try:
        with file:
            yield file
    except SafetensorError as error:
        # A tensor that is not there.
        raise _unreadable(path, error) from error


def load_weights(path: Path, framework: Literal["numpy", "pt"] = "numpy") -> dict[str, Any]:
    """Return every tensor of a safetensors file by name; as `open_weights`."""
    with open_weights(path, framework) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except TypeError as error:
            # A type that numpy does not have.
            raise _unreadable(path, error) from error


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read what a safetensors file says of its tensors.

    Returns
    -------
    tensors : dict of str to dict
        By name: `dtype`, `shape`, `data_offsets`.
    start : int
        Where the data begins, bytes; the offsets count from here.

    Raises
    ------
    BundleFileError
        As `open_weights`.
    """
    with open_weights(path):
        pass
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, _LENGTH.size + length


def misfit(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> str:
    """Return in what tensors differ from those that a model has, in words; empty where they fit.

    Parameters
    ----------
    expected, found : mapping of str to sequence of int
        Shapes by name.
    """
    both = sorted(set(expected) & set(found))
    problems = [
        ("missing", sorted(set(expected) - set(found))),
        ("unknown", sorted(set(found) - set(expected))),
        (
            "of another shape",
            [
                f"{name} {list(found[name])}, not {list(expected[name])}"
                for name in both
                if list(expected[name]) != list(found[name])
            ],
        ),
    ]
    return "; ".join(f"{what}: {_some(names)}" for what, names in problems if names)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_weights_below(folder: Path) -> None:
    """Check the header of every safetensors file below a folder.

    Raises
    ------
    BundleFileError
        For the first that is not such a file, as `open_weights`.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        with open_weights(path):
            pass


def _unreadable(path: Path, error: Exception) -> BundleFileError:
    name = _name(path)
    return BundleFileError(f"{name}: {_reason(error)}", [(name, "cannot be read")])


def _explained(path: Path, error: Exception) -> tuple[str, list[tuple[str, str]]]:
    name = _name(path)
    cause = _cause(path, error)
    return f"{name} {cause}", [(name, cause)]


def _name(path: Path) -> str:
    # The folder tells `unet` from `vae`; more would be a path of this machine.
    return f"{path.parent.name}/{path.name}"


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as failed:
        return f"cannot be read: {failed.strerror}"
    if size == 0:
        return "is empty: the download stopped, or the disk was full"
    if start[_LENGTH.size : _LENGTH.size + 1] == b"{":
        return f"is damaged or cut off after {size:,} bytes: download it again ({_reason(error)})"
    for magic, cause in _LOOK_ALIKES:
        if start.lstrip().startswith(magic):
            return cause
    if not any(start):
        return "holds zeros: the download was given its place and never its content; download it again"
    return f"is not safetensors ({_reason(error)})"


def _reason(error: Exception) -> str:
    return str(error).removeprefix("Error while deserializing header: ").splitlines()[0][:200]
