"""What a bundle holds, and in what two bundles differ, as plain values: ``monofacet bundle inspect`` and ``diff``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.bundle.load import Bundle
from services.bundle.manifest import Manifest
from services.modality.modalities import Modality
from services.modality.tables import Label
from services.weights import open_weights

# Sections of a manifest that `diff` compares value by value; files and dictionaries it compares by themselves.
_PLAIN = (
    "name",
    "description",
    "licences",
    "default_dictionary",
    "training_commands",
    "provenance",
    "diffusion",
)
# Matched decoder rows of at least this cosine are taken for the same feature, by the matching of SAEs over seeds.
SAME_COSINE = 0.7
# Rows that are compared at once; bounds the memory to 16 MiB a thousand features.
_BLOCK = 1024


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return what a bundle holds, as JSON values."""
    manifest = bundle.manifest
    described = bundle.describe()
    folders: Counter[str] = Counter()
    for path, entry in manifest.files.items():
        folders[path.partition("/")[0]] += entry.bytes
    pipeline = manifest.diffusion
    return {
        **{key: described[key] for key in ("id", "sha256", "name", "description", "licences")},
        "towers": described["towers"] | {"preprocessing": dict(bundle.clip_config.preprocess_cfg)},
        "dictionaries": [_dictionary(bundle, entry) for entry in described["dictionaries"]],
        "default_dictionary": manifest.default_dictionary,
        "bytes": sum(folders.values()),
        "bytes_by_folder": dict(sorted(folders.items())),
        "calibrations": [name for name in ("bias", "defense") if getattr(manifest, name) is not None],
        "probe": manifest.probe is not None,
        "samples": len(manifest.samples),
        "pipeline": None if pipeline is None else dataclasses.asdict(pipeline),
        "training_commands": list(manifest.training_commands),
        "provenance": dict(manifest.provenance),
    }


def _dictionary(bundle: Bundle, described: dict[str, Any]) -> dict[str, Any]:
    name = described["name"]
    entry = bundle.manifest.dictionaries[name]
    numbers = {
        key: value
        for key, value in bundle.metrics(name).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    labels: dict[str, int] = {}
    if described["has_modality"]:
        counted = Counter(bundle.modality(name).label.tolist())
        labels = {label.value: counted[label.value] for label in Label}
    return {
        **described,
        "recipe": str(entry.training.get("recipe") or entry.kind),
        "bytes": bundle.manifest.files[entry.weights].bytes if entry.weights else 0,
        "labels": labels,
        "figures": numbers,
    }


def diff_bundles(a: Bundle, b: Bundle) -> dict[str, Any]:
    """Return in what bundle `b` differs from bundle `a`, as JSON values."""
    return {
        "a": a.id,
        "b": b.id,
        "same": a.sha256 == b.sha256,
        "manifest": _changed_values(a.manifest, b.manifest),
        "files": _changed_files(a.manifest, b.manifest),
        "same_towers": a.manifest.clip.fingerprint == b.manifest.clip.fingerprint,
        "dictionaries": {
            name: _changed_dictionary(a, b, name)
            for name in sorted({*a.manifest.dictionaries, *b.manifest.dictionaries})
        },
    }


def _changed_values(a: Manifest, b: Manifest) -> dict[str, Any]:
    old, new = dataclasses.asdict(a), dataclasses.asdict(b)
    return {key: [old[key], new[key]] for key in _PLAIN if old[key] != new[key]}


def _changed_files(a: Manifest, b: Manifest) -> dict[str, Any]:
    both = sorted(set(a.files) & set(b.files))
    return {
        "added": sorted(set(b.files) - set(a.files)),
        "removed": sorted(set(a.files) - set(b.files)),
        "changed": {
            path: [a.files[path].bytes, b.files[path].bytes]
            for path in both
            if a.files[path].sha256 != b.files[path].sha256
        },
    }


def _changed_dictionary(a: Bundle, b: Bundle, name: str) -> dict[str, Any]:
    old, new = a.manifest.dictionaries.get(name), b.manifest.dictionaries.get(name)
    if old is None or new is None:
        return {"status": "added" if old is None else "removed"}
    sizes = {
        key: [getattr(old, key), getattr(new, key)]
        for key in ("kind", "n_features", "embed_dim")
        if getattr(old, key) != getattr(new, key)
    }
    same = old.weights is not None and new.weights is not None and (
        a.manifest.files[old.weights].sha256 == b.manifest.files[new.weights].sha256
    )  # fmt: skip
    result: dict[str, Any] = {"status": "same weights" if same else "changed", "sizes": sizes}
    if a.manifest.clip.fingerprint != b.manifest.clip.fingerprint:
        # Directions in two embedding spaces have no angle between them.
        return result | {"features": "not comparable: other towers"}
    if old.weights is None or new.weights is None or old.embed_dim != new.embed_dim:
        return result
    old_rows, new_rows = _rows(a, name), _rows(b, name)
    if {len(old_rows), len(new_rows)} == {1, 2}:
        # A dictionary that is shared has the same row for both modalities.
        old_rows, new_rows = (rows if len(rows) == 2 else rows * 2 for rows in (old_rows, new_rows))
    order, cosine = match_rows(_unit(old_rows), _unit(new_rows))
    matched, agreed = cosine >= SAME_COSINE, cosine[cosine > -1]
    result["features"] = {
        "compared": len(cosine),
        "matched": int(matched.sum()),
        "median_cosine": float(np.median(agreed)) if len(agreed) else None,
    }
    if name in a.manifest.modality and name in b.manifest.modality:
        before = a.modality(name).label[matched]
        after = b.modality(name).label[order[matched]]
        moved = Counter((str(x), str(y)) for x, y in zip(before, after, strict=True) if x != y)
        result["labels"] = {
            "changed": sum(moved.values()),
            "of": int(matched.sum()),
            "moves": {f"{x} -> {y}": count for (x, y), count in moved.most_common()},
        }
    return result


def _rows(bundle: Bundle, name: str) -> list[NDArray[np.float32]]:
    """Return the decoder rows, (n, d); of a pair of dictionaries those of images and those of texts."""
    entry = bundle.manifest.dictionaries[name]
    with open_weights(bundle.path / str(entry.weights)) as file:
        names = set(file.keys())
        wanted = ["decoder"] if "decoder" in names else [f"{modality}.decoder" for modality in Modality]
        return [file.get_tensor(key).astype(np.float32) for key in wanted]


def _unit(sides: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return rows of length 1, both sides beside each other where there are two."""
    rows = np.concatenate(sides, axis=1)
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def match_rows(
    a: NDArray[np.float32], b: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Match each row of `a` with its nearest row of `b`, where that one's nearest is it, too.

    Nearest neighbours that agree, and not an assignment of all to all, which would take n^3 and would match what has
    nothing in common.

    Parameters
    ----------
    a, b
        Unit rows, shapes (n, d) and (m, d).

    Returns
    -------
    order, cosine
        Row of `b` for each row of `a`, and its cosine; -1 where they do not agree. Both of shape (n,).
    """
    nearest, cosine = np.zeros(len(a), np.int64), np.zeros(len(a), np.float32)
    back, best = np.zeros(len(b), np.int64), np.full(len(b), -np.inf, np.float32)
    for start in range(0, len(a), _BLOCK):
        block = a[start : start + _BLOCK] @ b.T
        nearest[start : start + len(block)] = block.argmax(axis=1)
        cosine[start : start + len(block)] = block.max(axis=1)
        higher = block.max(axis=0) > best
        back[higher] = start + block.argmax(axis=0)[higher]
        best = np.maximum(best, block.max(axis=0))
    mutual = back[nearest] == np.arange(len(a))
    return nearest, np.where(mutual, cosine, np.float32(-1))
