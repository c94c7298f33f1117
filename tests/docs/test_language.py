"""The code speaks the field's language: each name of our own that once stood for a usual term is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("services", "deployments", "clients/python/monofacet", "benchmarks", "training")
# What was said, as a pattern of whole names of modules, classes, functions, variables and parameters; and what is
# said instead. Keys of files and fields of the contract are not names in the code.
INSTEAD = {
    r"quiet_\w+": "import_trimming, trimmed_",
    r"\w*LateServices": "DeferredServices",
    r"(Generate)?Work|works|work_of": "EncodeTask, GenerateTask, tasks, task_of",
    r"_?told": "attached, sent, raised: what was done with it",
    r"Pairs?": "ImageTextPair, SteeringPair, EmbeddingPairs, SAEPair, KeyPair",
    r"\w*okenis\w+": "tokenizer, tokenize",
    r"twin(_\w+)?": "unsteered, or smoothed",
    r"riders": "extra_outputs",
    r"screening": "defense",
    r"\w*figures": "metrics",
    r"piece_sizes|pieces": "chunk_sizes, chunks",
    r"[Rr]efer": "encode_reference",
    r"(read|write|check|record)_probe|Probe(?!s$)\w*": "selfcheck",
    r"\w*[Dd]efence\w*": "defense",
}
# Names that stay in the client: the option `--twin` of the command line and the type `Pair`, which callers have in
# their programs, and `told`, a name inside of functions.
CLIENT = ("clients/python/monofacet/", {"twin", "Pair", "told"})


def names(tree: ast.AST) -> Iterator[str]:
    """Yield every name that a module defines or reads, imports' last parts included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def named() -> set[tuple[str, str]]:
    """Return each module's path with each name in it, the module's own included."""
    found = set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "v1" in path.parts:
                continue
            where = path.relative_to(ROOT).as_posix()
            found.add((where, path.stem))
            found |= {(where, name) for name in names(ast.parse(path.read_text()))}
    return found


NAMED = named()


@pytest.mark.parametrize("pattern", INSTEAD)
def test_a_name_of_our_own_gave_way_to_the_usual_one(pattern: str) -> None:
    whole = re.compile(pattern)
    found = sorted(
        (where, name)
        for where, name in NAMED
        if whole.fullmatch(name) and not (where.startswith(CLIENT[0]) and name in CLIENT[1])
    )
    assert found == [], f"say {INSTEAD[pattern]}"


def test_the_names_of_today_are_among_those_that_are_looked_through() -> None:
    assert {"EncodeTask", "Tokenizer", "SelfCheck", "DeferredServices", "chunk_sizes"} <= {
        n for _, n in NAMED
    }
