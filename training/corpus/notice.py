"""Write NOTICE: whose drawings the embedded bundle learnt from, under which licence, in which version.

``python -m training.corpus.notice > NOTICE``
"""

from __future__ import annotations

from training.corpus.sets import Role, licences

HEAD = """Monofacet
Copyright 2026 the Monofacet authors

Licensed under the Apache License, Version 2.0 (see LICENSE).

The embedded bundle (bundles/emoji) was made from drawings by the artists below, each set installed from its npm
package `@iconify-json/<name>`. The drawings keep their own licences. The bundle contains weights trained on them
and small pictures of some of them (feature cards and samples; training artists only)."""

FOOT = """Interface definitions in protos/ that are not ours, each with its licence beside it:
  protos/buf/validate: protovalidate, Buf Technologies, Apache-2.0
  protos/google/rpc: Google APIs, Google LLC, Apache-2.0"""

USES = {
    Role.TRAIN: "Trained on, validated on; pictures of some are shown in the bundle",
    Role.AUXILIARY: "Trained on (towers only); no picture is in the bundle",
    Role.TEST: "Used for reporting only; nothing of it is in the bundle",
}


def render() -> str:
    """Return the text of NOTICE."""
    parts = [HEAD]
    rows = licences()
    for role, use in USES.items():
        parts.append(f"{use}:")
        parts.extend(
            f"  {row['name']} {row['version']}, {row['author']}, {row['licence']}\n    {row['url']}"
            for row in rows
            if row["role"] == role
        )
    return "\n\n".join([*parts, FOOT]).replace("\n\n  ", "\n  ") + "\n"


if __name__ == "__main__":
    print(render(), end="")
