"""Which sets the corpus has, what each is for, and where they lie after ``npm ci``.

Versions are pinned in ``package.json`` beside this file and nowhere else; licences are read from the
installed packages, so that NOTICE and the bundle's manifest say what was really used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

CORPUS_DIR = Path(__file__).parent
ICONIFY_DIR = CORPUS_DIR / "node_modules" / "@iconify-json"


class Role(StrEnum):
    """What a set may be used for."""

    TRAIN = "train"  # towers, dictionaries and diffusion; 5% of its drawings are held out for validation
    AUXILIARY = "auxiliary"  # towers only: line art that teaches words and shapes
    TEST = "test"  # reporting only: never trained on, never used to choose


@dataclass(frozen=True)
class IconSet:
    """One artist's set.

    Parameters
    ----------
    name : str
        Name of the iconify package.
    role : Role
        What the set may be used for.
    family : str
        Sets of one family share drawings (a flat and a shaded version of the same picture), so that a
        held-out drawing whose sibling was trained on can be counted apart.
    """

    name: str
    role: Role
    family: str

    def read(self, part: str) -> dict[str, Any]:
        """Return one JSON file of the package: ``icons``, ``chars``, ``metadata`` or ``info``."""
        path = ICONIFY_DIR / self.name / f"{part}.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `npm ci` in {CORPUS_DIR}")
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data


def _sets(role: Role, names: str, families: dict[str, str] | None = None) -> tuple[IconSet, ...]:
    families = families or {}
    return tuple(IconSet(name, role, families.get(name, name)) for name in names.split())


EMOJI_SETS = _sets(
    Role.TRAIN,
    "noto noto-v1 twemoji fluent-emoji fluent-emoji-flat fxemoji emojione",
    {"noto-v1": "noto", "fluent-emoji-flat": "fluent-emoji"},
)
ICON_SETS = _sets(
    Role.AUXILIARY,
    "tabler mdi ph lucide game-icons healthicons iconoir icon-park solar flat-color-icons",
)
TEST_SETS = _sets(Role.TEST, "openmoji")
ALL_SETS = EMOJI_SETS + ICON_SETS + TEST_SETS


def pinned_versions() -> dict[str, str]:
    """Return the pinned version of every set, by name."""
    package = json.loads((CORPUS_DIR / "package.json").read_text(encoding="utf-8"))
    prefix = "@iconify-json/"
    return {name.removeprefix(prefix): version for name, version in package["dependencies"].items()}


def licences() -> list[dict[str, str]]:
    """Return name, version, role, author and SPDX licence of every set, as its package states them."""
    versions = pinned_versions()
    rows = []
    for icon_set in ALL_SETS:
        info = icon_set.read("info")
        rows.append(
            {
                "name": icon_set.name,
                "version": versions[icon_set.name],
                "role": icon_set.role.value,
                "author": info["author"]["name"],
                "url": info["author"].get("url", ""),
                "licence": info["license"]["spdx"],
            }
        )
    return rows
