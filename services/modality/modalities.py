"""The two kinds of input."""

from __future__ import annotations

from enum import StrEnum


class Modality(StrEnum):
    """Which tower an embedding comes from."""

    IMAGE = "image"
    TEXT = "text"
