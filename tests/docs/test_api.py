"""docs/api.md is what the contract and the gateway's tables say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from deployments.access.scopes import SCOPES
from services.errors import BundleError, ImageError, MonofacetError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "api.md"
GIVEN = re.compile(r'(?:reason(?:: ClassVar\[str\])? ?= ?|Answer\(_Code\.[A-Z_]+, )"([A-Z_]+)"')


def test_writing_the_page_again_changes_nothing(tmp_path: Path) -> None:
    written = tmp_path / "api.md"
    subprocess.run([sys.executable, ROOT / "docs/reference", written], check=True)
    assert written.read_text() == PAGE.read_text(), "docs/api.md is not what protos/ say: run `make docs`"


def test_every_method_is_there_with_its_scope() -> None:
    text = PAGE.read_text()
    for name, scope in SCOPES.items():
        package, _, method = name.partition("/")
        if package.startswith("monofacet."):
            section = text.split(f"\n### {method}\n")[1].split("\n### ")[0]
            assert f"scope `{scope.value}`" in section


def below(kind: type[MonofacetError]) -> set[str]:
    return {kind.default_reason}.union(*map(below, kind.__subclasses__()))


def test_every_reason_that_the_code_gives_is_there() -> None:
    sources = [*(ROOT / "services").rglob("*.py"), *(ROOT / "deployments").rglob("*.py")]
    given = {name for path in sources for name in GIVEN.findall(path.read_text())}
    assert len(given) > 30
    listed = set(re.findall(r"^\| [A-Z_]+ \| `([A-Z_]+)` \|", PAGE.read_text(), re.MULTILINE))
    # Errors of a bundle end a start or a build: no caller reads them. ImageError is always one of its children.
    assert given - below(BundleError) - {ImageError.default_reason} == listed
