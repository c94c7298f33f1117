"""A pipeline's folder looked over before any library reads it, so that what is wrong is told by the file's name.

diffusers and transformers follow what a folder says: an index names files, a config may name an adapter, a quantiser or
code of its own, on this machine or on the hub. Here a folder is whole by itself, and nothing else is reached.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from services.errors import BundleFileError, ManifestError, UnsafeWeights, UnsupportedModel
from services.weights import open_weights, read_header

# The stems that diffusers and transformers read.
_STEMS = ("diffusion_pytorch_model", "model")
_INDEX = ".safetensors.index"
# Keys by which a config loads what is not in the folder, or runs what is.
_REFUSED = frozenset({"auto_map", "custom_pipelines", "quantization_config", "trust_remote_code"})
# Keys of a tokenizer's config that are opened as they stand.
_FILES = frozenset({"vocab_file", "merges_file", "tokenizer_file", "added_tokens_file"})
# Weights that people put beside a pipeline, which only their own loaders apply.
_ADAPTER_KEYS = ("lora_up", "lora_down", "lora_A", "lora_B", ".lora.", "hada_w1", "lokr_w1")


def weights_variant(folder: Path) -> str | None:
    """Check the weights of one part of a pipeline, and return the variant to load.

    Parameters
    ----------
    folder : Path
        Such as ``unet``.

    Returns
    -------
    str or None
        As `from_pretrained` takes it: None for the usual names, else what stands in their place, such as "fp16".

    Raises
    ------
    UnsafeWeights
        Where there are no safetensors.
    BundleFileError
        Where a file is no safetensors, or an index names one that is not there.
    ManifestError
        Where an index is none.
    """
    part = folder.name
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsafeWeights(f"{part}: weights must be safetensors", [(f"diffusion.{part}", "no safetensors")])
    for file in files:
        with open_weights(file):
            pass
    for index in sorted(folder.glob(f"*{_INDEX}*.json")):
        _check_index(index)
    names = {file.name for file in files} | {file.name for file in folder.glob(f"*{_INDEX}*.json")}
    usual = {f"{stem}{ending}" for stem in _STEMS for ending in (".safetensors", f"{_INDEX}.json")}
    if names & usual:
        return None
    found = sorted({variant for name in names if (variant := _variant(name)) is not None})
    if not found:
        raise BundleFileError(
            f"{part} has no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors, but {', '.join(sorted(names)[:4])}",
            [(f"diffusion.{part}", "no weights of a known name")],
        )
    # Half floats are what most people download, and what a GPU computes with anyway.
    return "fp16" if "fp16" in found else found[0]


def _variant(name: str) -> str | None:
    """Return "fp16" of ``model.fp16.safetensors`` and of ``model.safetensors.index.fp16.json``."""
    for stem in _STEMS:
        for start, end in ((f"{stem}.", ".safetensors"), (f"{stem}{_INDEX}.", ".json")):
            middle = name[len(start) : -len(end)]
            # A shard's name has a number behind the variant.
            if (
                name.startswith(start)
                and name.endswith(end)
                and middle
                and "-of-" not in middle
                and "." not in middle
            ):
                return middle
    return None


def _check_index(index: Path) -> None:
    name = f"{index.parent.name}/{index.name}"
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ManifestError(f"{name} is not an index of weights", [(name, "no weight_map")])
    for file in sorted(set(named.values())):
        if PurePosixPath(file).name != file:
            raise BundleFileError(
                f"{name} names {file!r}, which leads elsewhere", [(name, "leads elsewhere")]
            )
        if not (index.parent / file).is_file():
            whole = sorted(f.name for f in index.parent.glob("*.safetensors") if "-of-" not in f.name)
            advice = f"delete the index to load {whole[0]}" if whole else "the download is not complete"
            raise BundleFileError(f"{name} names {file}, which is not there: {advice}", [(name, "is stale")])


def check_configs(folder: Path) -> None:
    """Check that no JSON below a pipeline's folder leads out of it.

    Raises
    ------
    UnsupportedModel
        Naming the file and the key.
    """
    for path in sorted(folder.rglob("*.json")):
        # Vocabularies and indices are large, and name tokens and tensors.
        if _INDEX in path.name or path.name in ("vocab.json", "tokenizer.json", "added_tokens.json"):
            continue
        name = path.relative_to(folder).as_posix()
        if path.name == "adapter_config.json":
            raise UnsupportedModel(
                f"{name}: an adapter is not applied; merge it into the weights, or take it away"
            )
        for key, value in read_json(path).items():
            if key in _REFUSED and value:
                raise UnsupportedModel(f"{name}: {key} is not supported")
            if key in _FILES and value:
                raise UnsupportedModel(
                    f"{name}: {key} names a file; the tokenizer's files have their usual names"
                )


def adapters(folder: Path) -> list[str]:
    """Return the adapters, such as LoRA, below a pipeline's folder, by path: nothing here applies them."""
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        names = read_header(path)[0]
        if any(key in name for name in names for key in _ADAPTER_KEYS):
            found.append(path.relative_to(folder).as_posix())
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read an object.

    Raises
    ------
    ManifestError
        Where it is something else.
    """
    try:
        # Editors on Windows begin a file with a mark.
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path.parent.name}/{path.name} cannot be read") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{path.parent.name}/{path.name} is not a JSON object")
    return document
