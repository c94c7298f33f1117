"""A bundle on disk: load, verify, describe, write.

A bundle is a directory that holds everything the service knows about its models. It is trusted only as far as
its manifest goes: every file is hashed, none may be missing or extra, weights are safetensors and nothing
else, and a dictionary must have been trained on the very towers it is shipped with. Pickle is never read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CalibrationEntry,
    CardsEntry,
    ClipEntry,
    DictionaryEntry,
    DiffusionEntry,
    FileEntry,
    Licence,
    Manifest,
    Sample,
    check_references,
    manifest_sha256,
    parse_manifest,
)
from services.bundle.verification import bundle_files, file_sha256, verify_files, verify_towers
from services.dictionary_file import read_dictionary_json
from services.encoding.clip import ClipConfig, read_clip_config, tower_fingerprint
from services.errors import BundleFileError, UnknownDictionary
from services.modality.tables import Cards, ModalityTable, read_thumbnails
from services.strict_json import parse_dataclass

if TYPE_CHECKING:
    from services.dictionaries import Dictionary
    from services.imaging.dose import Attributes

CLIP_CONFIG = "clip/open_clip_config.json"
CLIP_WEIGHTS = "clip/open_clip_model.safetensors"
SELFCHECK = "clip/probe.safetensors"
DICTIONARIES = "dictionaries"
MODALITY = "modality"
CARDS = "cards"
CARD_IMAGES = "cards/images.parquet"
SAMPLES = "samples/samples.json"
ATTRIBUTES = "attributes"
BIAS = "bias"
DEFENSE = "defense"
DIFFUSION = "diffusion/monofacet.json"
STEERING = "steering"


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been read and, unless told otherwise, verified.

    Attributes
    ----------
    path : Path
        The directory.
    manifest : Manifest
        Parsed.
    sha256 : str
        Of the manifest's canonical JSON, hex.
    """

    path: Path
    manifest: Manifest
    sha256: str

    @property
    def id(self) -> str:
        """``<name>@<12 hex digits>``: what every response carries."""
        return f"{self.manifest.name}@{self.sha256[:12]}"

    @classmethod
    def load(cls, path: Path | str, verify: bool = True) -> Bundle:
        """Read a bundle.

        Parameters
        ----------
        path : Path or str
            The directory.
        verify : bool
            Check every file's hash and the towers' fingerprint. Without it only presence and size are
            checked: for a second process on a machine where the first one verified.

        Raises
        ------
        BundleError
            Of the kind that says what is wrong.
        """
        path = Path(path)
        try:
            text = (path / MANIFEST_NAME).read_bytes()
        except OSError as error:
            raise BundleFileError(f"{path.name}: no {MANIFEST_NAME} to read") from error
        manifest = parse_manifest(text)
        bundle = cls(path, manifest, manifest_sha256(manifest))
        verify_files(path, manifest, hashes=verify)
        verify_towers(path, manifest, recompute=verify)
        return bundle

    @cached_property
    def clip_config(self) -> ClipConfig:
        """The towers' configuration."""
        return read_clip_config(self.path / self.manifest.clip.config)

    @property
    def clip_weights(self) -> Path:
        """The towers' safetensors."""
        return self.path / self.manifest.clip.weights

    @property
    def dictionary_names(self) -> tuple[str, ...]:
        """Names of the dictionaries, sorted."""
        return tuple(sorted(self.manifest.dictionaries))

    def metrics(self, name: str) -> Mapping[str, Any]:
        """Return what was measured of a dictionary: on the validation set, where the bundle says on which."""
        measured = self.manifest.metrics.get("dictionaries", {})
        found = measured.get("validation", measured).get(name, {})
        return found if isinstance(found, Mapping) else {}

    def resolve(self, name: str) -> str:
        """Return `name`, or the default dictionary's name where it is empty.

        Raises
        ------
        UnknownDictionary
            Where the bundle has no such dictionary.
        """
        name = name or self.manifest.default_dictionary
        if name not in self.manifest.dictionaries:
            raise UnknownDictionary.named(name, self.manifest.dictionaries)
        return name

    def dictionary(self, name: str = "") -> Dictionary:
        """Load a dictionary (the default one where `name` is empty); read from disk on every call."""
        # Here, because it imports torch: a process that only reads tables starts seconds earlier without.
        from services.dictionaries import load_dictionary

        name = self.resolve(name)
        return load_dictionary((self.path / self.manifest.dictionaries[name].config).parent, name)

    def modality(self, name: str = "") -> ModalityTable:
        """Read the modality table of a dictionary.

        Raises
        ------
        UnknownDictionary
            Where the bundle has no such dictionary or no table for it.
        """
        name = self.resolve(name)
        if name not in self.manifest.modality:
            raise UnknownDictionary.named(name, self.manifest.modality)
        table = ModalityTable.read(self.path / self.manifest.modality[name])
        n_features = self.manifest.dictionaries[name].n_features
        if len(table) != n_features:
            raise BundleFileError(f"modality of {name}: {len(table)} rows for {n_features} features")
        return table

    def cards(self, name: str = "") -> Cards:
        """Read the feature cards of a dictionary.

        Raises
        ------
        UnknownDictionary
            Where the bundle has no such dictionary or no cards for it.
        """
        name = self.resolve(name)
        if name not in self.manifest.cards.tables:
            raise UnknownDictionary.named(name, self.manifest.cards.tables)
        return Cards.read(self.path / self.manifest.cards.tables[name], self.thumbnails)

    def attributes(self) -> Attributes | None:
        """Read doses and attribute directions; None in a bundle without them.

        Raises
        ------
        BundleError
            Where they are of a dictionary that the bundle does not have, or cannot be read.
        """
        if self.manifest.attributes is None:
            return None
        # Here, because reading a manifest needs none of it.
        from services.imaging.dose import Attributes

        known = Attributes.read((self.path / self.manifest.attributes.config).parent)
        name, d = known.config.dictionary, self.clip_config.embed_dim
        entry = self.manifest.dictionaries.get(name)
        last = max((int(a.ids.max()) for a in known.attributes.values() if len(a.ids)), default=0)
        if entry is None or last >= entry.n_features or known.whitening.shape != (d, d):
            raise BundleFileError(f"attributes: not of {name!r} and the towers of this bundle")
        return known

    @cached_property
    def thumbnails(self) -> dict[str, bytes]:
        """The WebP thumbnails that all cards share, by sample key."""
        images = self.manifest.cards.images
        return read_thumbnails(self.path / images) if images else {}

    def describe(self) -> dict[str, Any]:
        """Return what a caller may know: id, hash, licences, towers, dictionaries, metrics; no path."""
        config = self.clip_config
        return {
            "id": self.id,
            "sha256": self.sha256,
            "name": self.manifest.name,
            "description": self.manifest.description,
            "licences": [dataclasses.asdict(licence) for licence in self.manifest.licences],
            "provenance": dict(self.manifest.provenance),
            "metrics": dict(self.manifest.metrics),
            "towers": {
                "fingerprint": self.manifest.clip.fingerprint,
                "embed_dim": config.embed_dim,
                "image_size": list(config.image_size),
                "context_length": config.context_length,
            },
            "default_dictionary": self.manifest.default_dictionary,
            "dictionaries": [
                {
                    "name": name,
                    "kind": entry.kind,
                    "n_features": entry.n_features,
                    "embed_dim": entry.embed_dim,
                    "has_modality": name in self.manifest.modality,
                    "has_cards": name in self.manifest.cards.tables,
                }
                for name, entry in sorted(self.manifest.dictionaries.items())
            ],
        }


def write_manifest(
    path: Path,
    *,
    name: str,
    description: str,
    licences: Sequence[Licence],
    default_dictionary: str,
    provenance: Mapping[str, Any] | None = None,
    training_commands: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
) -> Manifest:
    """Describe the files under `path` in its ``manifest.json``.

    The layout says the rest: ``clip/``, ``dictionaries/<name>.json``, ``modality/<name>.parquet``,
    ``cards/<name>.parquet`` with ``cards/images.parquet``, ``samples/samples.json`` (a list of `Sample`, with
    paths relative to the bundle), ``<section>/<section>.json`` with its safetensors for each calibration,
    ``diffusion/monofacet.json`` (a `DiffusionEntry`), ``steering/<name>.safetensors`` and
    ``clip/probe.safetensors`` (see `services.bundle.selfcheck`).

    Returns
    -------
    Manifest
        As written.

    Raises
    ------
    BundleError
        Where the result could not be loaded: it is verified before it is written.
    """
    files = {
        relative: FileEntry(file_sha256(path / relative), (path / relative).stat().st_size)
        for relative in bundle_files(path)
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        description=description,
        licences=tuple(licences),
        provenance=dict(provenance or {}),
        training_commands=tuple(training_commands),
        metrics=dict(metrics or {}),
        clip=ClipEntry(CLIP_CONFIG, CLIP_WEIGHTS, tower_fingerprint(path / CLIP_CONFIG, path / CLIP_WEIGHTS)),
        dictionaries=_dictionary_entries(path),
        default_dictionary=default_dictionary,
        modality=_stems(path / MODALITY, MODALITY),
        cards=CardsEntry(
            {stem: file for stem, file in _stems(path / CARDS, CARDS).items() if file != CARD_IMAGES},
            CARD_IMAGES if CARD_IMAGES in files else None,
        ),
        samples=_samples(path),
        files=files,
        attributes=_calibration(path, ATTRIBUTES),
        bias=_calibration(path, BIAS),
        defense=_calibration(path, DEFENSE),
        diffusion=_diffusion(path),
        steering=_stems(path / STEERING, STEERING, ".safetensors"),
        probe=SELFCHECK if SELFCHECK in files else None,
    )
    check_references(manifest)
    verify_files(path, manifest, hashes=False)
    verify_towers(path, manifest, recompute=False)
    document = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    (path / MANIFEST_NAME).write_text(document + "\n", encoding="utf-8")
    return manifest


def refresh_manifest(path: Path) -> Manifest:
    """Describe the files under `path` anew, keeping what its manifest says that no file does.

    For a study that adds its calibration to a finished bundle.

    Raises
    ------
    BundleError
        As `write_manifest`.
    """
    old = parse_manifest((path / MANIFEST_NAME).read_bytes())
    return write_manifest(
        path,
        name=old.name,
        description=old.description,
        licences=old.licences,
        default_dictionary=old.default_dictionary,
        provenance=old.provenance,
        training_commands=old.training_commands,
        metrics=old.metrics,
    )


def _calibration(path: Path, section: str) -> CalibrationEntry | None:
    config = path / section / f"{section}.json"
    if not config.exists():
        return None
    fingerprint = json.loads(config.read_text(encoding="utf-8"))["tower_fingerprint"]
    return CalibrationEntry(f"{section}/{section}.json", f"{section}/{section}.safetensors", fingerprint)


def _dictionary_entries(path: Path) -> dict[str, DictionaryEntry]:
    entries = {}
    for config in sorted((path / DICTIONARIES).glob("*.json")):
        document = read_dictionary_json(config)
        weights = config.with_suffix(".safetensors")
        entries[config.stem] = DictionaryEntry(
            kind=document["kind"],
            config=f"{DICTIONARIES}/{config.name}",
            weights=f"{DICTIONARIES}/{weights.name}" if weights.exists() else None,
            tower_fingerprint=document["tower_fingerprint"],
            n_features=document["n_features"],
            embed_dim=document["embed_dim"],
            training=document["training"],
        )
    return entries


def _diffusion(path: Path) -> DiffusionEntry | None:
    file = path / DIFFUSION
    if not file.exists():
        return None
    return parse_dataclass(DiffusionEntry, json.loads(file.read_text(encoding="utf-8")), "diffusion")


def _stems(directory: Path, prefix: str, suffix: str = ".parquet") -> dict[str, str]:
    return {file.stem: f"{prefix}/{file.name}" for file in sorted(directory.glob(f"*{suffix}"))}


def _samples(path: Path) -> tuple[Sample, ...]:
    file = path / SAMPLES
    if not file.exists():
        return ()
    documents = json.loads(file.read_text(encoding="utf-8"))
    return tuple(parse_dataclass(Sample, item, f"samples[{i}]") for i, item in enumerate(documents))
