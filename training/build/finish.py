"""The last steps of a build: samples, the manifest, and the bundle in its place."""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from services.bundle.load import BIAS, DEFENSE, DICTIONARIES, SAMPLES, Bundle, write_manifest
from services.bundle.manifest import Licence
from services.dictionaries import Neurons
from services.encoding.clip import read_clip_config
from services.encoding.images import decode_image
from services.errors import ImageError
from training.build.assemble import QUANTILES, TABLES, copy_folders, copy_towers, in_place_of, without_nan
from training.build.embed import read_images
from training.build.pipeline import add_pipeline, check_steerable
from training.build.selection import Selection
from training.build.settings import BuildSettings
from training.build.store import StoreKey
from training.towers.embed import CONFIG_FILE

SAMPLE_SIDE = 256
# What may change the numbers of a build, if it changes.
PACKAGES = (
    "torch",
    "open_clip_torch",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "pillow",
    "pyarrow",
)
CALIBRATIONS = ((BIAS, (".json", ".safetensors")), (DEFENSE, (".json", ".safetensors")))


@dataclass(frozen=True)
class ManifestParts:
    """What the manifest says that no file does.

    Attributes
    ----------
    default : str
        The default dictionary.
    pairs : mapping of str to int
        Pairs by part, and rows that were skipped.
    store : StoreKey
        How embeddings were computed.
    selection : Selection
        The pairs.
    """

    default: str
    pairs: Mapping[str, int]
    store: StoreKey
    selection: Selection


def description(settings: BuildSettings) -> str:
    """Return what the bundle says of itself."""
    model = Path(settings.model).name if Path(settings.model).is_dir() else settings.model
    tag = f" ({settings.pretrained})" if settings.pretrained else ""
    return settings.description or f"Dictionaries of {model}{tag}, and what is known of their features."


def command(settings: BuildSettings) -> str:
    """Return the command that makes the bundle, without the paths of this machine."""
    options = [("model", Path(settings.model).name if Path(settings.model).is_dir() else settings.model)]
    defaults = BuildSettings(Path(), Path(), "")
    options += [("pairs", path.name) for path in settings.pairs]
    options += [("template", wording) for wording in settings.templates if settings.templates != ("{}",)]
    options += [("kind", name) for name in settings.kinds if settings.kinds != defaults.kinds]
    for name in (
        "pretrained", "revision", "dtype", "device", "features", "k", "steps", "epochs", "seeds", "seed", "fit_limit",
        "table_limit", "evaluation_limit", "resamples", "attack_images", "attack_steps", "samples",
    ):  # fmt: skip
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            options.append((name.replace("_", "-"), value))
    return " ".join(["monofacet bundle build", *(f"--{name} {str(value)!r}" for name, value in options)])


def provenance(settings: BuildSettings, parts: ManifestParts) -> dict[str, Any]:
    """Return versions and sizes of what made the bundle; no times, which differ from run to run."""
    key = asdict(parts.store)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "embeddings": {name: key[name] for name in ("templates", "dtype", "backend", "device", "precision")},
        "pairs": dict(parts.pairs),
        "seed": settings.seed,
    }


def metrics(work: Path) -> dict[str, Any]:
    """Return the figures of the stages, without what only the report shows."""
    found = {
        name: json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("retrieval", "dictionaries", "modality")
    }
    for summary in found["modality"].values():
        summary.pop("mds_histogram", None)
    result: dict[str, Any] = without_nan(found)
    return result


def _manifest(bundle: Path, settings: BuildSettings, parts: ManifestParts, work: Path) -> None:
    names = settings.licences or ("LicenseRef-unspecified",)
    write_manifest(
        bundle,
        name=settings.bundle_name,
        description=description(settings),
        licences=[Licence(name, "as its maker declared") for name in names],
        default_dictionary=parts.default,
        provenance=provenance(settings, parts),
        training_commands=(command(settings),),
        metrics=metrics(work),
    )


def check_pipeline(work: Path, settings: BuildSettings, fingerprint: str) -> None:
    """Refuse a pipeline that these towers' features cannot steer, before anything is trained for it."""
    folder = work / "pipeline"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_towers(work / "clip", folder, link=True)
    embed_dim = read_clip_config(work / "clip" / CONFIG_FILE).embed_dim
    Neurons(embed_dim).save(folder / DICTIONARIES, "neurons", tower_fingerprint=fingerprint)
    # Where it lies: it is copied into the bundle at the end.
    add_pipeline(folder, replace(settings, reference=True), fingerprint)
    write_manifest(folder, name="pipeline", description="", licences=(), default_dictionary="neurons")
    check_steerable(Bundle.load(folder, verify=False))


def study_bundle(work: Path, settings: BuildSettings, parts: ManifestParts) -> Bundle:
    """Write the bundle that the studies look at: towers, dictionaries and tables."""
    folder = work / "study"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_towers(work / "clip", folder, link=True)
    copy_folders(work, folder, TABLES[:2], settings.kinds)
    _manifest(folder, settings, parts, work)
    return Bundle.load(folder, verify=False)


def write_samples(bundle: Path, settings: BuildSettings, selection: Selection) -> None:
    """Write some test images with their captions, at most `SAMPLE_SIDE` pixels wide and high."""
    columns, chosen = selection.columns, selection.where("test")[: settings.samples]
    places = [(columns["source"][i], int(columns["row"][i])) for i in chosen]
    data = read_images(settings.pairs, places)
    folder = (bundle / SAMPLES).parent
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (i, place) in enumerate(zip(chosen, places, strict=True)):
        try:
            image = decode_image(data[place])
        except (KeyError, ImageError):
            continue
        image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        path = folder / f"{number:03d}.png"
        path.write_bytes(buffer.getvalue())
        caption = str(columns["caption"][i])
        entries.append({"path": path.relative_to(bundle).as_posix(), "caption": caption, "artist": ""})
    (bundle / SAMPLES).write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_bundle(work: Path, settings: BuildSettings, parts: ManifestParts, fingerprint: str) -> Bundle:
    """Put everything together, verify it, and put it in its place."""
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with in_place_of(settings.out) as bundle:
        copy_towers(work / "clip", bundle)
        copy_folders(work, bundle, (*TABLES[:2], *QUANTILES), settings.kinds)
        copy_folders(work, bundle, TABLES[2:], (*settings.kinds, "images"))
        for folder, suffixes in CALIBRATIONS:
            if (work / folder / f"{folder}.json").exists():
                copy_folders(work, bundle, ((folder, suffixes),))
        if settings.samples and settings.pairs and settings.thumbnails:
            write_samples(bundle, settings, parts.selection)
        shutil.copyfile(work / "report.html", bundle / "report.html")
        if settings.pipeline:
            add_pipeline(bundle, settings, fingerprint)
        _manifest(bundle, settings, parts, work)
    return Bundle.load(settings.out, verify=False)
