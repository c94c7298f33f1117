"""The commands and programs of the documentation run as they stand, page by page, against a real service."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from monofacet import Client
from monofacet.cli import app
from typer.testing import CliRunner

from services.bundle.load import Bundle
from services.imaging.statistics import ActivationStatistics
from tests.support.service import Service
from tests.support.waiting import CALL_S

ROOT = Path(__file__).resolve().parents[3]
PAGES = (
    "README.md",
    "docs/install.md",
    "docs/http.md",
    "docs/quickstart.md",
    "docs/from-feature-to-picture.md",
    "docs/bundles.md",
)
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Blocks that are not run here, by page and by how their first line begins, and why.
NOT_RUN = {
    "README.md": {
        "make demo": "minutes on the embedded bundle, and this suite itself; CI runs both",
        "monofacet serve": "does not return; the service that these tests share stands for it",
    },
    "docs/install.md": {"make demo": "as the README's"},
    "docs/bundles.md": {"make corpus": "fetches the drawings and trains for hours"},
    "docs/quickstart.md": {
        "make setup": "installs, and does not return; the environment and the service are there",
        "monofacet bundle build": "minutes; tests/e2e/test_own_bundle.py builds and serves one",
        "monofacet serve": "does not return; tests/e2e/test_two_bundles.py serves several",
    },
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    code: str

    @property
    def first_line(self) -> str:
        return self.code.splitlines()[0].partition("#")[0].strip()

    def __str__(self) -> str:
        return f"{Path(self.page).stem}-{self.number}: {self.first_line}"


BLOCKS = [
    Block(page, i, *found)
    for page in PAGES
    for i, found in enumerate(BLOCK.findall((ROOT / page).read_text(encoding="utf-8")), start=1)
]


def excused(block: Block) -> bool:
    return any(block.first_line.startswith(line) for line in NOT_RUN.get(block.page, ()))


@pytest.fixture(scope="module")
def feature(service: Service, bundle: Bundle) -> int:
    """A feature with quantiles, as a reader would choose one that was ever active."""
    statistics = ActivationStatistics.read(bundle.path / bundle.manifest.steering["sae"])
    with Client(service.target, timeout=CALL_S) as client:
        cards = list(client.features(labels=["cross"]))
    return next(card.feature for card in cards if statistics.active[card.feature])


@pytest.fixture(scope="module")
def folders(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One folder a page, in which its blocks run one after another, with what the pages say lies in it."""
    made: dict[str, Path] = {}

    def folder(page: str) -> Path:
        if page not in made:
            made[page] = path = tmp_path_factory.mktemp("page")
            shutil.copy(bundle.path / "samples" / "0.png", path / "picture.png")
            shutil.copytree(
                bundle.path / "samples", path / "pictures", ignore=shutil.ignore_patterns("*.json")
            )
            write_pairs(path / "pairs.csv", [sample.caption for sample in bundle.manifest.samples])
            (path / "my-bundle").symlink_to(bundle.path)
            write_labels(path / "labels.csv")
        return made[page]

    return folder


def write_labels(path: Path) -> None:
    """Twelve texts of each of two professions, a third of them ungendered."""
    items = [
        (noun, i, gender) for noun in ("cook", "pilot") for i, gender in enumerate(["woman", "man", ""] * 4)
    ]
    rows = [f"{noun} {i},{gender},{noun}" for noun, i, gender in items]
    path.write_text("\n".join(["text,gender,profession", *rows]))


def write_pairs(path: Path, captions: list[str]) -> None:
    """The table of the quickstart: every picture of two people, three times each, with and without a gender."""
    rows = [
        f"pictures/{i}.png,{caption} {gender},{i}-{person},{gender},cook"
        for i, caption in enumerate(captions)
        for person in range(2)
        for gender in ("woman", "man", "")
    ]
    path.write_text("\n".join(["image,text,group,gender,profession", *rows]))


def test_what_is_not_run_is_there_and_is_little() -> None:
    for page, lines in NOT_RUN.items():
        for line in lines:
            assert any(b.page == page and b.first_line.startswith(line) for b in BLOCKS), (page, line)
    assert sum(map(excused, BLOCKS)) * 2 < len(BLOCKS)


def commands(code: str) -> list[list[str]] | None:
    """The words of each line, if all of them are commands of ours and nothing is left for a shell to do."""
    lines = [shlex.split(os.path.expandvars(line), comments=True) for line in code.splitlines()]
    words = [line for line in lines if line]
    return words if all(line[0] == "monofacet" for line in words) and "\\\n" not in code else None


@pytest.mark.parametrize("block", [block for block in BLOCKS if not excused(block)], ids=str)
def test_a_block_runs(
    block: Block,
    service: Service,
    feature: int,
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folders(block.page))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"FEATURE": str(feature), "MONOFACET_TARGET": service.target, "COLUMNS": "160", "PATH": path}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = block.code.replace("127.0.0.1:9000", service.target).replace(
        "http://127.0.0.1:8080", service.http_url
    )
    code = code.replace("FEATURE=7", f"FEATURE={feature}")
    if block.language == "python":
        exec(compile(code, block.page, "exec"), {"__name__": "__main__"})
        return
    ours = commands(code)
    if ours is None:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        return
    for words in ours:
        # In this process: a new interpreter for each command would cost more than all the answers.
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"
