"""Checking a bundle on disk against its manifest, before anything in it is trusted."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from services.bundle.manifest import MANIFEST_NAME, Manifest, calibrations
from services.dictionary_file import read_dictionary_json
from services.encoding.clip import read_clip_config, tower_fingerprint
from services.errors import BundleFileError, ManifestError, TowerMismatch, UnsafeWeights

# Formats that run code when read, or hide such a format: refused wherever they lie in the bundle.
UNSAFE_SUFFIXES = frozenset(
    {
        ".bin",
        ".pt",
        ".pth",
        ".pkl",
        ".pickle",
        ".ckpt",
        ".joblib",
        ".npy",
        ".npz",
        ".h5",
        ".keras",
        ".msgpack",
        ".onnx",
    }
)


def bundle_files(path: Path) -> list[str]:
    """Return the relative POSIX paths of all files under `path` but the manifest, sorted.

    Raises
    ------
    UnsafeWeights
        Where one has a suffix of `UNSAFE_SUFFIXES`.
    BundleFileError
        Where one leads out of the bundle.
    """
    root = path.resolve()
    found = []
    for file in path.rglob("*"):
        if file.is_dir() and not file.is_symlink():
            continue
        relative = file.relative_to(path).as_posix()
        if file.suffix.lower() in UNSAFE_SUFFIXES:
            raise UnsafeWeights(
                f"{relative}: weights must be safetensors", [(relative, "not a safetensors file")]
            )
        if not file.resolve().is_relative_to(root) or not file.is_file():
            raise BundleFileError(f"{relative} is not a file of the bundle", [(relative, "leads elsewhere")])
        if relative != MANIFEST_NAME:
            found.append(relative)
    return sorted(found)


def verify_files(path: Path, manifest: Manifest, hashes: bool = True) -> None:
    """Check that the directory holds exactly the files of the manifest, with their sizes and hashes.

    Raises
    ------
    BundleFileError
        Naming every file at fault.
    UnsafeWeights
        Where weights are not safetensors.
    """
    for key, weights in [
        ("clip.weights", manifest.clip.weights),
        *((f"dictionaries.{name}.weights", entry.weights) for name, entry in manifest.dictionaries.items()),
        *((f"{section}.weights", entry.weights) for section, entry in calibrations(manifest).items()),
    ]:
        if weights is not None and not weights.endswith(".safetensors"):
            raise UnsafeWeights(f"{key}: weights must be safetensors", [(key, "not a safetensors file")])
    present, listed = set(bundle_files(path)), set(manifest.files)
    problems = [(name, "missing") for name in sorted(listed - present)]
    problems += [(name, "not in the manifest") for name in sorted(present - listed)]
    for name in sorted(listed & present):
        entry, file = manifest.files[name], path / PurePosixPath(name)
        size = file.stat().st_size
        if size != entry.bytes:
            problems.append((name, f"{size} bytes, the manifest says {entry.bytes}"))
        elif hashes and file_sha256(file) != entry.sha256:
            problems.append((name, "wrong SHA-256"))
    if problems:
        raise BundleFileError("; ".join(f"{name}: {what}" for name, what in problems), problems)


def verify_towers(path: Path, manifest: Manifest, recompute: bool = True) -> None:
    """Check that dictionaries and calibrations were made on the bundle's own towers and are as the manifest says.

    Raises
    ------
    TowerMismatch
        Where a fingerprint differs.
    ManifestError
        Where a dictionary's JSON disagrees with the manifest.
    """
    fingerprint = manifest.clip.fingerprint
    if recompute:
        actual = tower_fingerprint(path / manifest.clip.config, path / manifest.clip.weights)
        if actual != fingerprint:
            raise TowerMismatch(
                "the towers are not those the manifest describes", [("clip.fingerprint", f"is {actual}")]
            )
    embed_dim = read_clip_config(path / manifest.clip.config).embed_dim
    for section, calibration in calibrations(manifest).items():
        if calibration.tower_fingerprint != fingerprint:
            raise TowerMismatch(
                f"{section} was calibrated on other towers",
                [(f"{section}.tower_fingerprint", f"is not {fingerprint}")],
            )
    for name, entry in manifest.dictionaries.items():
        document = read_dictionary_json(path / entry.config)
        key = f"dictionaries.{name}.tower_fingerprint"
        if {document["tower_fingerprint"], entry.tower_fingerprint} != {fingerprint}:
            raise TowerMismatch(
                f"dictionary {name} was trained on other towers", [(key, f"is not {fingerprint}")]
            )
        if entry.embed_dim != embed_dim:
            raise ManifestError(
                f"dictionary {name} takes {entry.embed_dim} dimensions, the towers give {embed_dim}",
                [(f"dictionaries.{name}.embed_dim", f"is not {embed_dim}")],
            )
        differing = [
            field for field in ("kind", "n_features", "embed_dim") if document[field] != getattr(entry, field)
        ]
        if differing:
            raise ManifestError(
                f"dictionary {name}: {', '.join(differing)} differ from its JSON",
                [
                    (f"dictionaries.{name}.{field}", f"its JSON says {document[field]!r}")
                    for field in differing
                ],
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
