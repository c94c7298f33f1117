"""Doses and two attributes for a tiny bundle, made up and not fitted."""

from __future__ import annotations

import numpy as np

from services.bundle.load import Bundle, refresh_manifest
from services.imaging.dose import (
    Attribute,
    AttributeEntry,
    AttributeMeasures,
    Attributes,
    AttributesConfig,
    Share,
    whitening_of,
)

DICTIONARY = "sae"
SHARE = Share(0.75, 0.5, 0.875)
MEASURES = AttributeMeasures(24, SHARE, Share(0.0, 0.0, 0.25), SHARE, SHARE, 0.75, 0.5)


def make_attributes(
    fingerprint: str, embed_dim: int, *, unit: float = 0.5, fade: float = 0.25, dictionary: str = DICTIONARY
) -> Attributes:
    """Return an attribute that only raises features, `blue`, and one that also lowers some, `smile`."""
    embeddings = np.random.default_rng(5).standard_normal((500, embed_dim)) * np.linspace(0.2, 3, embed_dim)
    entries = (
        AttributeEntry("blue", "colour", 0.3, 25, 20, MEASURES),
        AttributeEntry("smile", "expression", 0.2, 12, 6),
    )
    changes = (
        (np.array([1, 2]), np.array([1.0, 0.5], np.float32)),
        (np.array([0, 3]), np.array([0.5, -9.0], np.float32)),
    )
    return Attributes(
        AttributesConfig(fingerprint, dictionary, unit, fade, {"made": "up"}, entries),
        whitening_of(embeddings.astype(np.float32)),
        {
            entry.name: Attribute(entry, ids.astype(np.int64), values)
            for entry, (ids, values) in zip(entries, changes, strict=True)
        },
    )


def add_attributes(bundle: Bundle, **changes: float) -> Bundle:
    """Add them to a bundle, changed in place, with a `sae` dictionary; return it, reloaded."""
    manifest = bundle.manifest
    known = make_attributes(manifest.clip.fingerprint, bundle.clip_config.embed_dim, **changes)  # type: ignore[arg-type]
    known.write(bundle.path / "attributes")
    refresh_manifest(bundle.path)
    return Bundle.load(bundle.path)
