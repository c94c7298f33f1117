"""Write docs/api.md from the contract: ``python docs/reference [FILE]``.

Comments, types and rules come from ``protos/``, scopes and statuses from the gateway's own tables. A test writes the
page again and compares; another checks that every reason that the code gives is on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from contract import Contract
from page import page

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Write the page to the given file, or in place."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "api.md"
    out.write_text(page(Contract.compile(ROOT / "protos")), encoding="utf-8")
    print(f"the reference is {out}")


if __name__ == "__main__":
    main()
