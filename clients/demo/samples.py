"""The pictures that a bundle ships to be tried on: held out of all training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


@dataclass(frozen=True)
class AttackedSample:
    """A sample that was changed so that the towers take it for something else.

    Parameters
    ----------
    sample : Sample
        Before.
    data : bytes
        The picture after it.
    target : str
        What it is to be taken for.
    levels : int
        Of 255: the most that any colour of any pixel was changed by.
    """

    sample: Sample
    data: bytes
    target: str
    levels: int


def load_samples(bundle: Path) -> list[Sample]:
    """Read the samples of a bundle."""
    return [
        Sample(Path(e["path"]).name, e["caption"], e["artist"], (bundle / e["path"]).read_bytes())
        for e in _read(bundle / "samples" / "samples.json")
    ]


def load_attacked(bundle: Path, samples: list[Sample]) -> AttackedSample | None:
    """Read the attacked sample of a bundle; None where it has none."""
    path = bundle / "samples" / "attacked.json"
    if not path.exists():
        return None
    document = _read(path)
    sample = next(s for s in samples if s.name == Path(document["sample"]).name)
    return AttackedSample(
        sample, (bundle / document["path"]).read_bytes(), document["target"], document["levels"]
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
