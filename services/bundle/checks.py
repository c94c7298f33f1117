"""Everything that can be checked of a bundle without serving it: ``monofacet bundle verify``.

Loading a bundle checks its hashes, because that is fast. This reads every weight and runs the towers besides, for a
bundle that came from elsewhere, or is about to go there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from services.bundle.load import Bundle
from services.bundle.manifest import MANIFEST_NAME, manifest_sha256, parse_manifest
from services.bundle.selfcheck import check_bundle
from services.bundle.verification import verify_files, verify_towers
from services.dictionaries import Dictionary
from services.encoding.clip import build_clip
from services.encoding.images import ImagePreprocess
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.errors import BundleFileError, ManifestError, MonofacetError
from services.modality.modalities import Modality
from services.weights import open_weights


@dataclass(frozen=True)
class Check:
    """One check: what it is about, what it found, and whether that is as it should be."""

    name: str
    ok: bool
    found: str


def run_checks(path: Path) -> Iterator[Check]:
    """Check the bundle at `path`, step by step; nothing more once its files are not those of its manifest.

    Yields
    ------
    Check
        As they are done: `manifest`, `files`, `towers`, `weights`, `dictionaries`, `tables`, `probe`.
    """
    try:
        manifest = parse_manifest(_read(path / MANIFEST_NAME))
    except MonofacetError as error:
        yield Check("manifest", False, str(error))
        return
    bundle = Bundle(path, manifest, manifest_sha256(manifest))
    yield Check("manifest", True, bundle.id)

    def files() -> str:
        verify_files(path, manifest)
        size = sum(entry.bytes for entry in manifest.files.values())
        return f"{len(manifest.files)} files, {size / 1e6:.1f} MB: every hash, none missing, none extra"

    def towers() -> str:
        verify_towers(path, manifest)
        return f"fingerprint {manifest.clip.fingerprint[:12]}, and all that was made on them says the same"

    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        ("files", files),
        ("towers", towers),
        ("weights", lambda: _weights(bundle)),
        ("dictionaries", lambda: _dictionaries(bundle)),
        ("tables", lambda: _tables(bundle)),
        ("probe", lambda: _probe(bundle)),
    )
    for name, step in steps:
        check = _checked(name, step)
        yield check
        if name == "files" and not check.ok:
            return


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleFileError(f"no {path.name} to read in {path.parent}") from error


def _checked(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, True, step())
    except MonofacetError as error:
        return Check(name, False, str(error))
    # A file that is what its hash says may still hold anything; what reading it raises is the finding.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])


def _weights(bundle: Bundle) -> str:
    """Read every tensor of every safetensors file; all must be finite, but for the quantiles of dead features."""
    count, problems = 0, []
    quantiles = set(bundle.manifest.steering.values())
    for name in sorted(bundle.manifest.files):
        if not name.endswith(".safetensors"):
            continue
        with open_weights(bundle.path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                count += tensor.numel()
                if not tensor.is_floating_point():
                    continue
                if name in quantiles and tensor.ndim == 2:
                    # A feature that never fires has none: its whole row is NaN.
                    tensor = tensor[~torch.isnan(tensor).all(dim=1)]
                if not torch.isfinite(tensor).all():
                    problems.append((name, f"{key} has values that are not finite"))
    if problems:
        raise BundleFileError("; ".join(f"{name}: {what}" for name, what in problems), problems)
    return f"{count:,} values, none that is not finite"


def _dictionaries(bundle: Bundle) -> str:
    """Load every dictionary and send unit vectors through it."""
    rng = np.random.default_rng(0)
    e = torch.from_numpy(rng.standard_normal((4, bundle.clip_config.embed_dim)).astype(np.float32))
    e = torch.nn.functional.normalize(e, dim=-1)
    for name in bundle.dictionary_names:
        dictionary = bundle.dictionary(name)
        if dictionary.embed_dim != bundle.clip_config.embed_dim:
            raise ManifestError(
                f"{name} takes {dictionary.embed_dim} dimensions, the towers give {bundle.clip_config.embed_dim}"
            )
        for modality in Modality:
            _round_trip(dictionary, name, e, modality)
    return ", ".join(bundle.dictionary_names)


@torch.inference_mode()
def _round_trip(dictionary: Dictionary, name: str, e: torch.Tensor, modality: Modality) -> None:
    z = dictionary.encode(e, modality)
    back, rows = dictionary.decode(z, modality), dictionary.decoder_rows(modality)
    n, d = dictionary.n_features, dictionary.embed_dim
    for what, tensor, shape in (("z", z, (len(e), n)), ("e_hat", back, (len(e), d)), ("D", rows, (n, d))):
        if tuple(tensor.shape) != shape:
            raise ManifestError(
                f"{name}: {what} of a {modality} has shape {tuple(tensor.shape)}, not {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise ManifestError(f"{name}: {what} of a {modality} is not finite")


def _tables(bundle: Bundle) -> str:
    """Read every table: columns, rows and types."""
    for name in bundle.manifest.modality:
        bundle.modality(name)
    for name in bundle.manifest.cards.tables:
        cards = bundle.cards(name)
        features = cards.table.column("feature").to_numpy()
        if (
            len(features)
            and not 0 <= features.min() <= features.max() < bundle.manifest.dictionaries[name].n_features
        ):
            raise BundleFileError(f"cards of {name}: features that the dictionary does not have")
    return f"{len(bundle.manifest.modality)} of modality, {len(bundle.manifest.cards.tables)} of cards"


def _probe(bundle: Bundle) -> str:
    """Run the towers in float32 on what the bundle recorded."""
    config = bundle.clip_config
    towers = TorchTowers(build_clip(config, bundle.clip_weights), config)
    if not check_bundle(bundle, ImagePreprocess(config), Tokenizer(config), towers):
        return "the towers load; this bundle recorded no probe, so what they answer cannot be compared"
    return "tokens, pixels and embeddings of both towers are as recorded"
