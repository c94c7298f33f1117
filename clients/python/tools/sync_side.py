"""Generate the synchronous client from the asyncio one: ``python clients/python/tools/sync_side.py [OUT]``.

Each module of ``monofacet/_async`` becomes one of ``monofacet/_sync``, but `transport.py`, of which each side has its
own. What is generated is committed, so that it can be read and installed as any other code; a test generates it again
and compares. ``OUT`` is the folder for it, by default ``monofacet/_sync``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "monofacet"
BY_HAND = "transport.py"

# Pattern and replacement, in order. Imports that these leave double or unused are ruff's to remove.
CODE = {
    r"\basync (?=def |with |for )": "",
    r"\bawait ": "",
    r"\b_async\b": "_sync",
    r"\bgrpc\.aio\.": "grpc.",
    r"\bAsyncCore\b": "SyncCore",
    r"\bAsync(?=Iterable\b|Iterator\b)": "",
    # A parameter that takes either kind of iterable.
    r"\b(Iterable\[.+?\]) \| \1(?!\w)": r"\1",
    r"\bAwaitable\[([^][]+)\]": r"\1",
    r"\b__a(?=(enter|exit)__)": "__",
    r"\ba(?=(iter|next)\()": "",
    r"\basync(?=contextmanager\b)": "",
}
# Where the docstrings differ. A space stands for any white space.
PROSE = {
    "the asyncio client": "the synchronous client",
    "Start a call; return what is awaited or iterated over.": "Make a call with one answer, or start one with several.",
    " The iterable may be asynchronous.": "",
    "as the server takes them,": "as the server takes them, in another thread,",
    "To leave the loop early and end the call at once, use `contextlib.aclosing`.": (
        "Leaving the loop early ends the call."
    ),
    "To leave early and stop the work at once, use `contextlib.aclosing`.": (
        "Leaving the loop early stops the work on the server within a step."
    ),
}


def convert(sources: Mapping[str, str]) -> dict[str, str]:
    """Translate modules.

    Parameters
    ----------
    sources
        Text of each module of the asyncio client, by its name.

    Returns
    -------
    dict
        Text of each module of the synchronous client, by its name.

    Raises
    ------
    ValueError
        If a rule of this file finds nothing to change: it is out of date.
    """
    made = dict(sources)
    rules = CODE | {re.escape(phrase).replace(r"\ ", r"\s+"): said for phrase, said in PROSE.items()}
    for pattern, replacement in rules.items():
        counted = {name: re.subn(pattern, replacement, text) for name, text in made.items()}
        if not any(count for _, count in counted.values()):
            raise ValueError(f"nothing matches {pattern!r}")
        made = {name: text for name, (text, _) in counted.items()}
    note = "# Generated from ../_async/{} by tools/sync_side.py: edit that one, and run `make protos`.\n"
    return {name: tidied(note.format(name) + text, name) for name, text in made.items()}


def tidied(text: str, name: str) -> str:
    """Mend the imports and the line breaks as `make format` does.

    Parameters
    ----------
    text
        Of a module.
    name
        Of its file.

    Returns
    -------
    str
        As it is committed.
    """
    ruff = [sys.executable, "-m", "ruff"]
    place = ["--stdin-filename", PACKAGE / "_sync" / name, "-"]
    for step in (
        ["check", "--quiet", "--select", "F401,I,UP028", "--fix", "--unsafe-fixes"],
        ["format", "--quiet"],
    ):
        text = subprocess.run(
            [*ruff, *step, *place], input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


def main() -> None:
    """Generate into the given folder, or in place."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE / "_sync"
    paths = [path for path in sorted((PACKAGE / "_async").glob("*.py")) if path.name != BY_HAND]
    for name, text in convert({path.name: path.read_text(encoding="utf-8") for path in paths}).items():
        (out / name).write_text(text, encoding="utf-8")
    print(f"the synchronous client in {out}, {len(paths)} modules")


if __name__ == "__main__":
    main()
