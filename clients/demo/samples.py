"""The pictures that a bundle ships to be tried on: held out of all training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One picture with its caption.

    Parameters
    ----------
    name : str
        File name.
    caption : str
        What it shows.
    artist : str
        The set that it is from.
    data : bytes
        The encoded picture.
    """

    name: str
    caption: str
    artist: str
    data: bytes


def load_samples(bundle: Path) -> list[Sample]:
    """Read the samples of a bundle."""
    entries = json.loads((bundle / "samples" / "samples.json").read_text(encoding="utf-8"))
    return [
        Sample(Path(e["path"]).name, e["caption"], e["artist"], (bundle / e["path"]).read_bytes())
        for e in entries
    ]
