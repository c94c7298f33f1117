"""How the modules of training hang together."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "training").rglob("*.py")
    if "node_modules" not in path.parts
}


def _imported(path: Path) -> set[str]:
    """Modules of training that a file imports anywhere, also for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def test_no_module_imports_itself_through_others():
    # Raises CycleError, which names the modules.
    order = TopologicalSorter({name: _imported(path) for name, path in MODULES.items()}).static_order()
    assert set(order) == set(MODULES)


def test_every_folder_says_what_it_holds():
    folders = [path for path in (ROOT / "training").iterdir() if any(path.glob("*.py"))]
    assert len(folders) > 5
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder.name
