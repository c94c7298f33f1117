"""The map in CONTRIBUTING.md is of the code as it is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAP = PAGE[PAGE.index("## The map") :]


def walks() -> list[tuple[int, list[str]]]:
    """Return how many files each walk says that it has, and the names that it lists, braces unfolded."""
    found = []
    for paragraph in MAP.split("\n\n"):
        if paragraph.startswith("**From "):
            number = re.search(r"\*\* (\d+)", paragraph)
            assert number
            text = re.sub(r"\((?:or|and) [^)]*\)", "", paragraph.partition(":")[2])
            names = []
            for name in re.findall(r"`([\w/{},]+)`", text):
                stem, _, inner = name.partition("{")
                names += [stem + part for part in inner.rstrip("}").split(",")] if inner else [name]
            found.append((int(number[1]), [name for name in names if not name.endswith("/")]))
    return found


def test_the_files_to_read_first_exist() -> None:
    files = re.findall(r"^\d+\. `([\w/.]+)`:", MAP, re.MULTILINE)
    assert len(files) == 10
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_walks_count_their_files_and_each_exists() -> None:
    every = {path.with_suffix("").as_posix() for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    assert len(walks()) == 2
    for number, names in walks():
        assert len(names) == number
        assert [name for name in names if not any(path.endswith("/" + name) for path in every)] == []


def test_the_floors_are_those_of_the_import_linter() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = [name.removeprefix("deployments.") for layer in layers for name in layer.split(" | ")]
    told = re.search(r"`deployments` has these floors.*?`services` is", MAP, re.DOTALL)
    assert told
    assert [name for name in floors if name != "shares" and f"`{name}`" not in told[0]] == []
