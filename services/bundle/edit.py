"""Putting a dictionary into a finished bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from services.bundle.load import DICTIONARIES, Bundle, refresh_manifest
from services.bundle.selfcheck import read_selfcheck
from services.dictionaries.base import Dictionary
from services.encoding.towers import Embeddings
from services.errors import ManifestError
from services.modality.modalities import Modality

# It becomes the stem of two files.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def add_dictionary(
    path: Path, name: str, dictionary: Dictionary, training: Mapping[str, Any]
) -> tuple[Bundle, float | None]:
    """Write `dictionary` into the bundle at `path` and describe the bundle anew.

    Parameters
    ----------
    path : Path
        Of the bundle; verified before it is touched.
    name : str
        No dictionary of the bundle yet.
    dictionary : Dictionary
        Trained on unit embeddings of the bundle's towers: its caller vouches for that.
    training : mapping
        Record of where it comes from.

    Returns
    -------
    bundle, kept
        The bundle with its new id, and the mean cosine of the self-check's embeddings with their reconstructions, which
        a dictionary of other towers leaves near 0; None without one.

    Raises
    ------
    BundleError
        Where the bundle cannot be trusted, the name is taken or no name, or the sizes do not fit.
    """
    bundle = Bundle.load(path)
    if NAME.fullmatch(name) is None or name in bundle.manifest.dictionaries:
        what = "is there already" if name in bundle.manifest.dictionaries else "is no name"
        raise ManifestError(f"dictionary {name!r} {what}", [(f"dictionaries.{name}", what)])
    if dictionary.embed_dim != bundle.clip_config.embed_dim:
        raise ManifestError(
            f"the dictionary takes {dictionary.embed_dim} dimensions, the towers give {bundle.clip_config.embed_dim}"
        )
    folder = path / DICTIONARIES
    dictionary.save(folder, name, tower_fingerprint=bundle.manifest.clip.fingerprint, training=dict(training))
    try:
        refresh_manifest(path)
    except Exception:
        # The manifest is as it was, and must not meet a file that it does not list.
        for suffix in (".json", ".safetensors"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        raise
    return Bundle.load(path), _kept(bundle, dictionary)


@torch.inference_mode()
def _kept(bundle: Bundle, dictionary: Dictionary) -> float | None:
    if bundle.manifest.probe is None:
        return None
    recorded = read_selfcheck(bundle.path / bundle.manifest.probe)
    cosines = []
    for modality, raw in ((Modality.IMAGE, recorded.images), (Modality.TEXT, recorded.captions)):
        e = torch.from_numpy(Embeddings.of(raw).unit)
        cosines.append(torch.cosine_similarity(e, dictionary.reconstruct(e, modality)))
    return float(torch.cat(cosines).mean())
