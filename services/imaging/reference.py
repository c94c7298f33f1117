"""Where a pipeline's folder is: in the bundle, elsewhere on this machine, or on the Hugging Face hub.

Only JSON, tokenizer text and safetensors are ever fetched, hashed or read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from services.bundle.manifest import DiffusionEntry
from services.bundle.verification import file_sha256
from services.errors import BundleFileError, ManifestError
from services.strict_json import canonical_json

HUB = "hf-hub:"
READABLE = (".json", ".txt", ".safetensors")


def pipeline_folder(bundle: Path, entry: DiffusionEntry, verify: bool = True) -> Path:
    """Return the folder that holds the pipeline of a bundle.

    Parameters
    ----------
    bundle : Path
        The bundle's directory; its own files are verified with the bundle.
    entry : DiffusionEntry
        Which pipeline.
    verify : bool
        Check the hash of weights that lie outside the bundle.

    Raises
    ------
    BundleFileError
        Where the folder is not there, or its hash is not the manifest's.
    ManifestError
        Where weights outside the bundle come without a hash, or from the hub without a revision.
    """
    if entry.reference is None:
        return bundle / entry.path
    if entry.sha256 is None:
        raise ManifestError("weights outside the bundle need a hash", [("diffusion.sha256", "missing")])
    if entry.reference.startswith(HUB):
        folder = _from_hub(entry.reference.removeprefix(HUB), entry.revision)
    else:
        folder = Path(entry.reference)
    if not (folder / "model_index.json").is_file():
        raise BundleFileError("the referenced pipeline is not there", [("diffusion.reference", "not found")])
    if verify and folder_sha256(folder) != entry.sha256:
        raise BundleFileError(
            "the referenced pipeline is not the one the manifest describes",
            [("diffusion.sha256", "is another")],
        )
    return folder


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 (hex) over the paths and hashes of the readable files below `folder`.

    Raises
    ------
    BundleFileError
        Where a folder below it is a link.
    """
    # Files behind such a link would be loaded, but are not walked to.
    if any(file.is_symlink() and file.is_dir() for file in folder.rglob("*")):
        message = "the referenced pipeline has a folder that is a link"
        raise BundleFileError(message, [("diffusion.reference", "leads elsewhere")])
    hashes = {
        file.relative_to(folder).as_posix(): file_sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in READABLE
    }
    return hashlib.sha256(canonical_json(hashes)).hexdigest()


def _from_hub(repository: str, revision: str | None) -> Path:
    if revision is None:
        raise ManifestError(
            "weights from the hub need a revision: a branch may change", [("diffusion.revision", "missing")]
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [f"*{suffix}" for suffix in READABLE]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BundleFileError(
            "the pipeline cannot be had from the hub", [("diffusion.reference", "not found")]
        ) from error


if __name__ == "__main__":
    import sys

    print(folder_sha256(Path(sys.argv[1])))
