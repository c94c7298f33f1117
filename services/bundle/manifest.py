"""The manifest of a bundle: frozen dataclasses, and what must hold between them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from services.errors import ManifestError
from services.strict_json import canonical_json, parse_dataclass

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
# The name is half of the bundle's id, and part of the names of processes, log files and metrics.
NAME = re.compile(r"\w[\w .+-]{0,63}")
NAME_RULE = "must be 1 to 64 letters, digits, spaces and . + - _, and begin with a letter or digit"
OPTIONAL_SECTIONS = frozenset({"attributes", "bias", "defense", "diffusion", "probe", "steering"})


@dataclass(frozen=True)
class Licence:
    """What part of the bundle is under which licence.

    Attributes
    ----------
    name : str
        SPDX identifier, such as ``CC-BY-4.0``.
    applies_to : str
        The part: a set of drawings, the weights.
    source : str
        Where the part comes from, with its version.
    """

    name: str
    applies_to: str
    source: str = ""


@dataclass(frozen=True)
class FileEntry:
    """One file: SHA-256 (64 hex digits) and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ClipEntry:
    """The CLIP model: paths of open_clip's config and of the weights, and the fingerprint of the towers."""

    config: str
    weights: str
    fingerprint: str


@dataclass(frozen=True)
class DictionaryEntry:
    """One dictionary.

    Attributes
    ----------
    kind : str
        A key of the registry in `services.dictionaries`.
    config : str
        Path of its JSON.
    weights : str or None
        Path of its safetensors; None for a dictionary without parameters.
    tower_fingerprint : str
        Fingerprint of the towers whose embeddings it was trained on.
    n_features, embed_dim : int
        Sizes n and d.
    training : mapping
        Free-form record of the training.
    """

    kind: str
    config: str
    weights: str | None
    tower_fingerprint: str
    n_features: int
    embed_dim: int
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A held-out image with its caption, shipped for demonstrations."""

    path: str
    caption: str
    artist: str = ""


@dataclass(frozen=True)
class CardsEntry:
    """Feature cards: one table a dictionary, and the thumbnails they share (None without thumbnails)."""

    tables: Mapping[str, str]
    images: str | None = None


@dataclass(frozen=True)
class CalibrationEntry:
    """What a study measured on the bundle's own towers and dictionaries: JSON, safetensors, and which towers."""

    config: str
    weights: str
    tower_fingerprint: str


@dataclass(frozen=True)
class DiffusionEntry:
    """The text-to-image pipeline, as ``diffusion/monofacet.json`` describes it.

    Attributes
    ----------
    pipeline : str
        Its class in diffusers: ``StableDiffusionPipeline`` or ``StableUnCLIPImg2ImgPipeline``.
    conditioning : str
        The path that steers it by default: ``embedding`` or ``prompt``.
    tower_fingerprint : str
        Fingerprint of the towers whose embeddings the pipeline takes. Where it is not that of the bundle's own
        towers the pipeline generates but refuses to be steered.
    height, width : int
        Default size of a picture, pixels; multiples of 8.
    num_inference_steps : int
        Default number of steps.
    guidance_scale : float
        Default scale of classifier-free guidance; 1 is none.
    max_height, max_width : int or None
        Largest size, pixels; None is the default size.
    max_inference_steps : int
        Largest number of steps.
    noise_level : int
        0 to 999, unCLIP only: noise added to the embedding.
    embedding_from_prompt : bool
        Without a reference picture the embedding is the prompt's own text embedding; else it is all zeros.
    scheduler : str or None
        Class that replaces the folder's scheduler, built from the same config.
    ip_adapter : str or None
        Path, below the folder, of an IP-Adapter in safetensors.
    ip_adapter_scale : float
        Its weight beside the text.
    path : str
        The folder, below the bundle.
    reference, revision, sha256 : str or None
        Weights that lie elsewhere: ``hf-hub:owner/name`` at a revision, or a folder of this machine; and the
        hash that `services.imaging.reference.folder_sha256` gives for it.
    """

    pipeline: str
    conditioning: str
    tower_fingerprint: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_height: int | None = None
    max_width: int | None = None
    max_inference_steps: int = 50
    noise_level: int = 0
    embedding_from_prompt: bool = True
    scheduler: str | None = None
    ip_adapter: str | None = None
    ip_adapter_scale: float = 1.0
    path: str = "diffusion"
    reference: str | None = None
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything the service knows about a bundle before it opens the weights.

    Attributes
    ----------
    schema_version : int
        Always `SCHEMA_VERSION`.
    name, description : str
        For people; the name is the first half of the bundle's id, and as `NAME` has it.
    licences : tuple of Licence
        Of the data and of the weights.
    provenance, metrics : mapping
        Free-form records of where the bundle comes from and how it measured.
    training_commands : tuple of str
        The commands that made the bundle, in order.
    clip : ClipEntry
        The towers.
    dictionaries : mapping of str to DictionaryEntry
        By name.
    default_dictionary : str
        A key of `dictionaries`.
    modality : mapping of str to str
        Dictionary name to the path of its modality table.
    cards : CardsEntry
        Feature cards.
    samples : tuple of Sample
        Demonstration images.
    files : mapping of str to FileEntry
        Every file of the bundle but the manifest, by relative POSIX path.
    bias, defense : CalibrationEntry or None
        Calibrations of BiasService and DefenseService; None where the study was not run.
    diffusion : DiffusionEntry or None
        The text-to-image pipeline; None in a bundle without one.
    steering : mapping of str to str
        Dictionary name to the path of its activation quantiles.
    probe : str or None
        Path of what the towers answered when the bundle was made (see `services.bundle.selfcheck`); None in a bundle
        without.
    attributes : CalibrationEntry or None
        Doses and attribute directions (see `services.imaging.dose`); None in a bundle without.
    """

    schema_version: int
    name: str
    description: str
    licences: tuple[Licence, ...]
    provenance: Mapping[str, Any]
    training_commands: tuple[str, ...]
    metrics: Mapping[str, Any]
    clip: ClipEntry
    dictionaries: Mapping[str, DictionaryEntry]
    default_dictionary: str
    modality: Mapping[str, str]
    cards: CardsEntry
    samples: tuple[Sample, ...]
    files: Mapping[str, FileEntry]
    bias: CalibrationEntry | None = None
    defense: CalibrationEntry | None = None
    diffusion: DiffusionEntry | None = None
    steering: Mapping[str, str] = field(default_factory=dict)
    probe: str | None = None
    attributes: CalibrationEntry | None = None


def manifest_sha256(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) of the manifest's canonical JSON, without the sections that the bundle lacks.

    So a bundle keeps its id when a later server knows of more sections.
    """
    document = {k: v for k, v in dataclasses.asdict(manifest).items() if v or k not in OPTIONAL_SECTIONS}
    return hashlib.sha256(canonical_json(document)).hexdigest()


def parse_manifest(text: str | bytes) -> Manifest:
    """Parse a manifest.

    Parameters
    ----------
    text : str or bytes
        The JSON document.

    Returns
    -------
    Manifest
        Checked against the types above and against itself: every path it names is listed in `files`.

    Raises
    ------
    ManifestError
        Naming the key at fault.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest is not JSON: {error}") from error
    if isinstance(document, dict) and document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise ManifestError(
            f"schema_version is {found!r}; this server reads {SCHEMA_VERSION}",
            [("schema_version", f"must be {SCHEMA_VERSION}")],
        )
    manifest = parse_dataclass(Manifest, document, "")
    check_references(manifest)
    return manifest


def calibrations(manifest: Manifest) -> dict[str, CalibrationEntry]:
    """Return the calibrations that the bundle has, by the name of their section."""
    entries = {"attributes": manifest.attributes, "bias": manifest.bias, "defense": manifest.defense}
    return {section: entry for section, entry in entries.items() if entry is not None}


def check_references(manifest: Manifest) -> None:
    """Raise ManifestError where the manifest names a file or dictionary that it does not list."""
    named: list[tuple[str, str | None]] = [
        ("clip.config", manifest.clip.config),
        ("clip.weights", manifest.clip.weights),
        ("cards.images", manifest.cards.images),
        ("probe", manifest.probe),
    ]
    for name, entry in manifest.dictionaries.items():
        named += [
            (f"dictionaries.{name}.config", entry.config),
            (f"dictionaries.{name}.weights", entry.weights),
        ]
    named += [(f"modality.{name}", path) for name, path in manifest.modality.items()]
    for section, calibration in calibrations(manifest).items():
        named += [(f"{section}.config", calibration.config), (f"{section}.weights", calibration.weights)]
    named += [(f"cards.tables.{name}", path) for name, path in manifest.cards.tables.items()]
    named += [(f"steering.{name}", path) for name, path in manifest.steering.items()]
    named += [(f"samples[{i}].path", sample.path) for i, sample in enumerate(manifest.samples)]
    problems = [
        (key, f"{path!r} is not listed in files")
        for key, path in named
        if path is not None and path not in manifest.files
    ]
    # A dictionary is loaded by name from its folder.
    problems += [
        (f"dictionaries.{name}.{key}", f"must be dictionaries/{name}{suffix}")
        for name, entry in manifest.dictionaries.items()
        for key, path, suffix in (
            ("config", entry.config, ".json"),
            ("weights", entry.weights, ".safetensors"),
        )
        if path not in (None, f"dictionaries/{name}{suffix}")
    ]
    for section, names in (
        ("modality", manifest.modality),
        ("cards.tables", manifest.cards.tables),
        ("steering", manifest.steering),
    ):
        problems += [
            (f"{section}.{name}", f"{name!r} is not a dictionary of this bundle")
            for name in names
            if name not in manifest.dictionaries
        ]
    problems += _pipeline_problems(manifest)
    if manifest.default_dictionary not in manifest.dictionaries:
        problems.append(("default_dictionary", f"{manifest.default_dictionary!r} is not in dictionaries"))
    if NAME.fullmatch(manifest.name) is None:
        problems.append(("name", NAME_RULE))
    if problems:
        raise ManifestError("; ".join(f"{key}: {what}" for key, what in problems), problems)


def _pipeline_problems(manifest: Manifest) -> list[tuple[str, str]]:
    """Return what would let the pipeline load weights that no hash covers."""
    entry = manifest.diffusion
    if entry is None:
        return []
    paths = {"path": PurePosixPath(entry.path)}
    if entry.ip_adapter is not None:
        paths["ip_adapter"] = PurePosixPath(entry.ip_adapter)
    problems = [
        (f"diffusion.{key}", f"{str(path)!r} leads elsewhere")
        for key, path in paths.items()
        if path.is_absolute() or ".." in path.parts
    ]
    # Weights outside the bundle are hashed as a folder, when it is read.
    if entry.reference is None and not problems:
        folder = paths.pop("path")
        named = {"path": folder / "model_index.json", **{key: folder / path for key, path in paths.items()}}
        problems = [
            (f"diffusion.{key}", f"{str(path)!r} is not listed in files")
            for key, path in named.items()
            if str(path) not in manifest.files
        ]
    return problems
