"""The towers of a build: any open_clip model, as a config and safetensors in a folder of the build's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from services.encoding.clip import read_clip_config, tower_fingerprint
from services.errors import MonofacetError
from training.build.errors import BuildError
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

HUB = "hf-hub:"
# Names of the weights in repositories of open_clip models, the usual one first; pickled ones are never taken.
HUB_WEIGHTS = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "model.safetensors")
# What a pretrained tag says of the pictures its model takes.
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def fetch_towers(model: str, pretrained: str, revision: str | None, out: Path) -> str:
    """Put open_clip's config and safetensors of a model into `out`, and return the towers' fingerprint.

    Parameters
    ----------
    model : str
        A local folder, ``hf-hub:owner/name``, or the name of an open_clip model.
    pretrained : str
        The tag of the weights; only for an open_clip name.
    revision : str or None
        Of a repository on the hub.
    out : Path
        Folder; made if absent, its files replaced.

    Raises
    ------
    BuildError
        Where there is no such model, or no safetensors of it.
    """
    config, weights = _find(model, pretrained, revision)
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / CONFIG_FILE, config)
    try:
        read_clip_config(out / CONFIG_FILE)
        fingerprint = tower_fingerprint(out / CONFIG_FILE, weights)
        # Weights may be gigabytes: they are copied once.
        if not _holds(out, fingerprint):
            part = out / f"{WEIGHTS_FILE}.part"
            shutil.copyfile(weights, part)
            part.replace(out / WEIGHTS_FILE)
    except (MonofacetError, OSError, ValueError, KeyError) as error:
        raise BuildError(f"model {model}: {error}") from error
    return fingerprint


def _holds(out: Path, fingerprint: str) -> bool:
    try:
        return tower_fingerprint(out / CONFIG_FILE, out / WEIGHTS_FILE) == fingerprint
    except (MonofacetError, OSError):
        # None yet, or half a copy.
        return False


def _find(model: str, pretrained: str, revision: str | None) -> tuple[str, Path]:
    """Return the text of the config and the path of the weights."""
    if model.startswith(HUB):
        return _from_hub(model.removeprefix(HUB), revision)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    if pretrained:
        return _from_name(model, pretrained, revision)
    raise BuildError(
        f"model {model}: no such folder; an open_clip name needs --pretrained, a hub repository {HUB}owner/name"
    )


def _from_folder(folder: Path) -> tuple[str, Path]:
    if not (folder / CONFIG_FILE).is_file():
        raise BuildError(f"{folder} has no {CONFIG_FILE}")
    named = [folder / name for name in HUB_WEIGHTS if (folder / name).is_file()]
    found = named or sorted(folder.glob("*.safetensors"))
    if not named and len(found) != 1:
        raise BuildError(
            f"{folder} must hold one .safetensors, preferably {WEIGHTS_FILE}; it has {len(found)}"
        )
    return (folder / CONFIG_FILE).read_text(encoding="utf-8-sig"), found[0]


def _from_hub(repository: str, revision: str | None) -> tuple[str, Path]:
    config = _download(repository, (CONFIG_FILE,), revision)
    return config.read_text(encoding="utf-8-sig"), _download(repository, HUB_WEIGHTS, revision)


def _from_name(name: str, tag: str, revision: str | None) -> tuple[str, Path]:
    from services.encoding.trimmed_open_clip import whole_open_clip

    open_clip = whole_open_clip()
    model_cfg: dict[str, Any] | None = open_clip.get_model_config(name)
    if model_cfg is None:
        raise BuildError(f"open_clip has no model {name!r}")
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise BuildError(f"{name} has no weights {tag!r}; it has: {tags}")
    repository = str(known.get("hf_hub", "")).strip("/")
    if not repository:
        raise BuildError(f"{name} {tag}: its weights are a pickle, not safetensors, and are not read")
    # Weights know which activation they were trained with; the name alone does not.
    model_cfg = {**model_cfg, "quick_gelu": bool(known.get("quick_gelu", model_cfg.get("quick_gelu", False)))}
    preprocess = {key: known[key] for key in PREPROCESS_KEYS if known.get(key) is not None}
    config = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=1)
    return config, _download(repository, HUB_WEIGHTS, revision)


def _download(repository: str, names: tuple[str, ...], revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    missing: Exception | None = None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError as error:
            raise BuildError(f"{HUB}{repository} cannot be reached, and {name} is not cached") from error
        except EntryNotFoundError as error:
            missing = error
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise BuildError(f"{HUB}{repository}: {error}") from error
    raise BuildError(
        f"{HUB}{repository} has none of {', '.join(names)}; pickled weights are not read"
    ) from missing


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
