"""Putting a bundle together: the same for the embedded one and for anybody's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.bundle.load import (
    CARDS,
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    DICTIONARIES,
    MODALITY,
    SELFCHECK,
    STEERING,
    Bundle,
)
from services.bundle.manifest import MANIFEST_NAME
from services.bundle.selfcheck import check_selfcheck, read_selfcheck, write_selfcheck
from services.encoding.clip import build_clip, read_clip_config
from services.encoding.images import ImagePreprocess
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from training.build.errors import BuildError
from training.build.selfcheck import PROBE_FILE, probe_of_folder
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

# Folders of a build that go into a bundle as they are, and which of their files.
TABLES = ((DICTIONARIES, (".json", ".safetensors")), (MODALITY, (".parquet",)), (CARDS, (".parquet",)))
QUANTILES = ((STEERING, (".safetensors",)),)
# In the folder that a bundle is made in, with the bundle's own name: only what holds it is ours to delete.
MARKER = "monofacet-build"
NEW, OLD = "new", "old"


def copy_towers(clip: Path, bundle: Path, link: bool = False) -> None:
    """Copy open_clip's config and weights into a bundle, and write their probe.

    A folder that brings a probe of its own, recorded with the code that the towers were trained by, is held to that;
    else open_clip's own loading of the folder is what the bundle is held to.

    Parameters
    ----------
    clip, bundle : Path
        From and to.
    link : bool
        Link the weights where the file system can.

    Raises
    ------
    SelfCheckMismatch
        Where the service's towers answer otherwise.
    """
    for source, target in ((clip / CONFIG_FILE, CLIP_CONFIG), (clip / WEIGHTS_FILE, CLIP_WEIGHTS)):
        (bundle / target).parent.mkdir(parents=True, exist_ok=True)
        if link and source.name == WEIGHTS_FILE:
            try:
                os.link(source, bundle / target)
                continue
            except OSError:
                pass
        shutil.copyfile(source, bundle / target)
    given = clip / PROBE_FILE
    probe = read_selfcheck(given) if given.exists() else probe_of_folder((bundle / CLIP_CONFIG).parent)
    config = read_clip_config(bundle / CLIP_CONFIG)
    towers = TorchTowers(build_clip(config, bundle / CLIP_WEIGHTS), config)
    tokenizer = Tokenizer(config)
    check_selfcheck(
        probe, ImagePreprocess(config), lambda texts: tokenizer.tokenize(texts, truncate=True), towers
    )
    write_selfcheck(bundle / SELFCHECK, probe)


def copy_folders(
    work: Path, bundle: Path, folders: Sequence[tuple[str, Sequence[str]]], only: Sequence[str] | None = None
) -> None:
    """Copy the files of `folders` with their suffixes into a bundle.

    Parameters
    ----------
    work, bundle : Path
        From and to.
    folders : sequence of (folder, suffixes)
        Such as `TABLES`.
    only : sequence of str or None
        Stems to take; None takes all.
    """
    for folder, suffixes in folders:
        (bundle / folder).mkdir(parents=True, exist_ok=True)
        for file in sorted((work / folder).iterdir()):
            if file.suffix in suffixes and (only is None or file.stem in only):
                shutil.copyfile(file, bundle / folder / file.name)


@contextmanager
def in_place_of(out: Path) -> Iterator[Path]:
    """Give a folder to make a bundle in; verify the bundle, and only then put it where the old one is.

    The folder lies beside `out`, hidden. What a run that was killed left of it is cleared here; nothing else that lies
    there is touched, whatever it is called.

    Raises
    ------
    BuildError
        Where `out` is there and is not a bundle.
    """
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for folder in list(out.parent.iterdir()):
        if _is_ours(folder, out):
            _clear(folder, out)
    ours = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        (ours / MARKER).write_text(out.name, encoding="utf-8")
        part = ours / NEW
        part.mkdir()
        yield part
        Bundle.load(part)
        # Hours may have passed.
        check_replaceable(out)
        if out.exists():
            out.rename(ours / OLD)
        part.rename(out)
    finally:
        _clear(ours, out)


def _is_ours(folder: Path, out: Path) -> bool:
    """Return whether a folder is one that a bundle for `out` was made in."""
    marker = folder / MARKER
    try:
        # By its name first: what else lies beside a bundle need not be readable.
        return folder.name.startswith(f".{out.name}.") and marker.read_text(encoding="utf-8") == out.name
    except (OSError, ValueError):
        return False


def _clear(ours: Path, out: Path) -> None:
    """Delete a folder of ours; a bundle that was moved into it, and has no successor yet, goes back to its place."""
    if (ours / OLD).exists() and not out.exists():
        (ours / OLD).rename(out)
    shutil.rmtree(ours, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Raise BuildError where `out` holds something else than a bundle."""
    if out.exists() and not (out / MANIFEST_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out} is there and is not a bundle: it is not replaced")


def without_nan(value: Any) -> Any:
    """Return JSON values with NaN as None, which a manifest may not hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
