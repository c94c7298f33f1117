"""JSON read strictly into frozen dataclasses, and the one way to write it.

An unknown key, a missing key and a value of the wrong type are errors that name the key, because a manifest
that is nearly right is how the wrong weights get served.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from services.errors import ManifestError

T = TypeVar("T")


def canonical_json(value: object) -> bytes:
    """Return the one byte string that stands for `value`: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def parse_dataclass(kind: type[T], value: object, where: str) -> T:
    """Build the frozen dataclass `kind` from parsed JSON, strictly.

    Parameters
    ----------
    kind : type
        A dataclass whose fields are JSON scalars, mappings, tuples or other such dataclasses.
    value : object
        What `json.loads` returned.
    where : str
        Dotted path of `value` in the document, for the error.

    Raises
    ------
    ManifestError
        On an unknown key, a missing key or a value of the wrong type.
    """
    if not isinstance(value, dict):
        raise _wrong_type(where, "an object", value)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    problems = [(_join(where, key), "unknown key") for key in value if key not in fields]
    problems += [
        (_join(where, name), "missing key")
        for name, f in fields.items()
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if problems:
        raise ManifestError("; ".join(f"{key}: {what}" for key, what in problems), problems)
    return kind(**{key: _parse(hints[key], item, _join(where, key)) for key, item in value.items()})


def _parse(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong_type(where, "a list", value)
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong_type(where, "an object", value)
        return {key: _parse(arguments[1], item, _join(where, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_dataclass(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int in Python; a manifest that says `true` where a size belongs is wrong.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(where, f"a value of type {hint.__name__}", value)
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _wrong_type(where: str, expected: str, value: object) -> ManifestError:
    what = f"must be {expected}, not {type(value).__name__}"
    return ManifestError(f"{where or 'manifest'}: {what}", [(where, what)])
