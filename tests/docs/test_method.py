"""docs/method.md names functions that exist, and each of its formulas names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/method.md").read_text()
REFERENCES = sorted({(path, name) for name, path in re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", PAGE)})


def names(path: Path) -> set[str]:
    """The names that a module defines, with those of its classes below them."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
    return found


@pytest.mark.parametrize(("path", "name"), REFERENCES, ids=lambda part: part)
def test_a_reference_exists(path: str, name: str) -> None:
    assert name in names(ROOT / path)


def test_each_formula_has_a_function_beside_it() -> None:
    blocks = PAGE.split("\n\n")
    formulas = [i for i, block in enumerate(blocks) if block.startswith("```math")]
    assert len(formulas) > 25
    for i in formulas:
        beside = "".join(blocks[max(i - 1, 0) : i + 3])
        assert ".py)" in beside, blocks[i]


def test_sources_are_numbered_in_order_and_all_used() -> None:
    text, sources = PAGE.split("\n## Sources\n")
    prose = re.sub(r"```math.*?```|\$`.*?`\$", "", text, flags=re.DOTALL)
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", sources, re.MULTILINE)]
    used = {
        int(n)
        for found in re.findall(r"\[(\d[^\]]*)\](?!\()", prose)
        for n in re.findall(r"(?<![\w.])\d+(?![.\d])", found)
    }
    assert numbers == list(range(1, len(numbers) + 1))
    assert used == set(numbers)


# What serving reads from the bundle's tables; `training` computes it when the bundle is made.
OFFLINE = {
    "associate",
    "rank_by_association",
    "gender_direction",
    "Neurons",
    "match_features",
    "cohen_kappa",
    "split_half_agreement",
    "emb_sim",
    "win_rate",
    "mean_over_features",
    "npmi",
    "whitening_of",
    "Phrases",
    "average_precision",
    "name_features",
    "area_under_roc",
    "top_samples",
    "embedding_features",
}


def uses(package: str) -> dict[str, set[str]]:
    """Return what each function, class and constant of a package, by its bare name, uses by name; "" for the rest."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.setdefault(node.name, set()).update(names_in(node))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    found.setdefault(getattr(target, "id", ""), set()).update(names_in(node))
            elif isinstance(node, ast.Expr):
                found.setdefault("", set()).update(names_in(node))
    return found


def names_in(node: ast.AST) -> set[str]:
    """Return the names and attributes that a piece of code reads. Imports and strings are no use."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
    }


def reached(*packages: str) -> set[str]:
    """Return the names that packages use, themselves and through what they use of services."""
    services = uses("services")
    seen: set[str] = set()
    ahead = {name for package in packages for used in uses(package).values() for name in used}
    while ahead:
        seen |= ahead
        ahead = {name for at in ahead for name in services.get(at, ())} - seen
    return seen


def test_each_function_of_the_page_is_the_one_that_is_used() -> None:
    # A twin of a formula elsewhere, with the page's own function left to its tests, would go unseen.
    every = {name.rpartition(".")[2]: path for path, name in REFERENCES}
    assert set(every) - reached("deployments", "training") == set()
    served = reached("deployments")
    computed = {name for name, path in every.items() if path.startswith("services/")}
    # By names alone, some may be taken for used that are not; none for unused that is used.
    assert computed - served <= OFFLINE <= computed
