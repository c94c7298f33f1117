"""A dictionary's JSON on disk; apart from the dictionaries, so that reading it needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.errors import ManifestError

# Every kind of dictionary there is; `services.dictionaries` registers one class for each.
KINDS = ("ncl", "neurons", "sae", "sae-pair")
_KEYS = {"kind", "embed_dim", "n_features", "tower_fingerprint", "config", "training"}


def read_dictionary_json(path: Path) -> dict[str, Any]:
    """Read a dictionary's JSON.

    Returns
    -------
    dict
        With exactly the keys that `Dictionary.save` writes.

    Raises
    ------
    ManifestError
        On another set of keys or an unknown kind.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ManifestError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != _KEYS:
        raise ManifestError(f"{path.name} must hold exactly the keys {sorted(_KEYS)}")
    if document["kind"] not in KINDS:
        raise ManifestError(f"{path.name}: kind {document['kind']!r} is not one of {', '.join(KINDS)}")
    return document
