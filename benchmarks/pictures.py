"""The pictures that all callers send, drawn once and kept in a file: the load generator must start lightly."""

from __future__ import annotations

import os
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "out" / "bench" / "pictures"


def write_pictures(files: list[bytes]) -> None:
    """Write the files, in order."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.iterdir():
        old.unlink()
    for number, data in enumerate(files):
        (PICTURES / f"{number:03}.jpg").write_bytes(data)


def read_pictures() -> list[bytes]:
    """Return the files, in order."""
    return [(PICTURES / name).read_bytes() for name in sorted(os.listdir(PICTURES))]
