"""Records that show themselves in a line or two: an answer of 256 inputs would fill a notebook."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

# Characters of a text, and of a record within a record; items of a list.
TEXT, RECORD, ITEMS = 60, 80, 3


class Brief:
    """Base of the dataclasses that calls take and return."""

    __slots__ = ()

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # of the classes below this one
        shown = (f"{field.name}={brief(getattr(self, field.name))}" for field in fields if field.repr)
        return f"{type(self).__name__}({', '.join(shown)})"


def brief(value: Any) -> str:
    """Show a value in a few words: arrays by type and shape, lists by their length.

    Parameters
    ----------
    value
        Of a field.

    Returns
    -------
    str
        At most about a hundred characters.
    """
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, PIL.Image.Image):
        return f"<{value.width} x {value.height} pixels>"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    if isinstance(value, enum.StrEnum):
        return str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= TEXT else f"{value[: TEXT - 1]}…")
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Brief):
        shown = repr(value)
        return shown if len(shown) <= RECORD else f"{type(value).__name__}(...)"
    if isinstance(value, Mapping):
        items = [f"{brief(key)}: {brief(item)}" for key, item in list(value.items())[: ITEMS + 1]]
        return f"{{{', '.join(items)}}}" if len(items) <= ITEMS else f"<{len(value):,} items>"
    if isinstance(value, Sequence):
        if len(value) > ITEMS or any(isinstance(item, Brief) for item in value):
            return f"<{len(value):,} x {type(value[0]).__name__}>"
        return f"({', '.join(map(brief, value))})"
    shown = repr(value)
    return shown if len(shown) <= RECORD else f"<{type(value).__name__}>"
