"""The code in the client's README runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from monofacet.testing import run_server

README = Path(__file__).resolve().parents[2] / "clients" / "python" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with run_server() as target:
        yield target


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 9


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("heart", "star"):
        PIL.Image.new("RGB", (8, 8), "red").save(f"{name}.png")
    exec(compile(block.replace("localhost:9000", target), "README.md", "exec"), {"__name__": "__main__"})
