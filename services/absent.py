"""Importing a library without an optional one that it would import for nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Have modules not to be had, unless they have been imported already; libraries take them for not installed."""
    absent = [name for name in names if name not in sys.modules]
    # An import of what is None fails.
    sys.modules.update(dict.fromkeys(absent, cast(ModuleType, None)))
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
