"""Put a Stable Diffusion pipeline into a bundle, or a reference to it; refuse one that its features cannot steer."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from services.bundle.load import DIFFUSION, Bundle
from services.bundle.manifest import DiffusionEntry
from services.errors import MonofacetError
from services.imaging.conditioning import Conditioner
from services.imaging.embedder import Embedder
from services.imaging.features import Features
from services.imaging.folder import adapters
from services.imaging.pipeline import STABLE_DIFFUSION, STABLE_UNCLIP, load_parts
from services.imaging.reference import HUB, READABLE, folder_sha256, pipeline_folder
from services.strict_json import parse_dataclass
from training.build.errors import BuildError
from training.build.settings import BuildSettings

ENTRY = "monofacet.json"
# What people use with pipelines that say nothing of it.
STEPS, GUIDANCE = 25, 7.5


def pipeline_entry(folder: Path, fingerprint: str) -> DiffusionEntry:
    """Return what the bundle says of a pipeline.

    That is its own ``monofacet.json`` where it has one. Otherwise it is read off the folder, and that its tower is the
    bundle's is only claimed: `check_steerable` finds out.

    Raises
    ------
    BuildError
        Where the folder is no pipeline that can be served, or it says that it takes another tower's embeddings.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if (folder / ENTRY).is_file():
            document = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
            entry = parse_dataclass(DiffusionEntry, document, "diffusion")
            entry = replace(entry, path="diffusion", reference=None, revision=None, sha256=None)
        else:
            entry = _read_off(folder, index, fingerprint)
    except (OSError, ValueError, KeyError, TypeError, MonofacetError) as error:
        raise BuildError(f"{folder} is not a pipeline that can be served: {error}") from error
    if entry.tower_fingerprint != fingerprint:
        raise BuildError(
            f"the pipeline takes the embeddings of the towers {entry.tower_fingerprint[:12]}, and the dictionaries are "
            f"of the towers {fingerprint[:12]}: its pictures could not be steered by them"
        )
    return entry


def _read_off(folder: Path, index: dict[str, Any], fingerprint: str) -> DiffusionEntry:
    kind = index["_class_name"]
    if kind not in (STABLE_DIFFUSION, STABLE_UNCLIP):
        raise BuildError(f"a {kind} is not served; {STABLE_DIFFUSION} and {STABLE_UNCLIP} are")
    if kind == STABLE_UNCLIP:
        raise BuildError(f"a {STABLE_UNCLIP} needs a {ENTRY} that names the towers whose embeddings it takes")
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    side = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    return DiffusionEntry(
        pipeline=kind,
        conditioning="prompt",
        tower_fingerprint=fingerprint,
        height=side,
        width=side,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        embedding_from_prompt=False,
    )


def locate(settings: BuildSettings) -> Path:
    """Return the folder of the pipeline, fetched where it is on the hub."""
    if not settings.pipeline.startswith(HUB):
        return Path(settings.pipeline).resolve()
    # What `pipeline_folder` needs of an entry are the place and, though it is not checked here, a hash.
    entry = DiffusionEntry("", "", "", 8, 8, 1, 1.0, reference=settings.pipeline,
                           revision=settings.pipeline_revision, sha256="")  # fmt: skip
    return pipeline_folder(Path(), entry, verify=False)


def add_pipeline(bundle: Path, settings: BuildSettings, fingerprint: str) -> None:
    """Copy the pipeline's readable files into a bundle, or write where it lies and its hash."""
    folder = locate(settings)
    entry = pipeline_entry(folder, fingerprint)
    target = (bundle / DIFFUSION).parent
    target.mkdir(parents=True, exist_ok=True)
    if settings.reference:
        remote = settings.pipeline.startswith(HUB)
        entry = replace(
            entry,
            reference=settings.pipeline if remote else str(folder),
            revision=settings.pipeline_revision if remote else None,
            sha256=folder_sha256(folder),
        )
    else:
        left_out = {folder / name for name in left_adapters(folder, entry)}
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix in READABLE and file.name != ENTRY and file not in left_out:
                place = target / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    (bundle / DIFFUSION).write_text(json.dumps(asdict(entry), indent=1) + "\n", encoding="utf-8")


def left_adapters(folder: Path, entry: DiffusionEntry) -> list[str]:
    """Return the adapters of a pipeline's folder, such as LoRA, that nothing applies."""
    try:
        return [name for name in adapters(folder) if name != entry.ip_adapter]
    except MonofacetError as error:
        raise BuildError(f"the pipeline cannot be served: {error}") from error


def check_steerable(bundle: Bundle) -> None:
    """Load the pipeline as it is served, and ask whether it can be steered by the bundle's features.

    Raises
    ------
    BuildError
        Where it cannot, with the reason.
    """
    entry = bundle.manifest.diffusion
    if entry is None:
        raise BuildError("the bundle has no pipeline")
    try:
        parts = load_parts(pipeline_folder(bundle.path, entry), entry, bundle=bundle)
        conditioner = Conditioner(parts, Embedder(bundle, "cpu"), Features(bundle))
    except MonofacetError as error:
        raise BuildError(f"the pipeline cannot be served: {error}") from error
    size, normaliser = bundle.clip_config.embed_dim, parts.image_normalizer
    if normaliser is not None and normaliser.mean.shape[-1] != size:
        raise BuildError(
            f"the pipeline takes embeddings of {normaliser.mean.shape[-1]} numbers, and these towers give {size}"
        )
    if not conditioner.paths:
        reasons = sorted({str(why) for why in conditioner.refusals.values() if why is not None})
        raise BuildError(f"the pipeline cannot be steered by this bundle's features: {'; '.join(reasons)}")
