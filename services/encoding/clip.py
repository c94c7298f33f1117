"""open_clip's model: its config, its fingerprint, and building it from safetensors.

The config is open_clip's own JSON, ``{"model_cfg": {...}, "preprocess_cfg": {...}}``, so that another CLIP
differs by configuration alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.errors import ManifestError, UnsupportedModel
from services.strict_json import canonical_json
from services.weights import load_weights, misfit, open_weights, read_header

if TYPE_CHECKING:
    from torch import nn

# CLIP's own normalisation, open_clip's default; written out because importing open_clip takes seconds, which
# a process that only reads a config should not pay.
OPENAI_DATASET_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_DATASET_STD = (0.26862954, 0.26130258, 0.27577711)
# What DistributedDataParallel puts before every name.
_PARALLEL = "module."
# Of any number in model_cfg; the largest there are, vocabularies, have some 10^5, and no tower has 100 blocks.
MAX_SIZE, MAX_LAYERS = 1_000_000, 200
# Options of CLIP's tokenizer that change no vocabulary and open no file, and the cleanings it has.
TOKENIZER_KEYS = frozenset({"clean", "reduction_mask"})
CLEANINGS = frozenset({"lower", "whitespace", "canonicalize"})
_TIMM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# What open_clip's preprocess_cfg may hold. A key that is passed over would be a preprocessing that is not done.
PREPROCESS_KEYS = frozenset({"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"})


@dataclass(frozen=True)
class ClipConfig:
    """What the towers and the preprocessing need to know.

    Attributes
    ----------
    model_cfg, preprocess_cfg : dict
        As in open_clip's JSON.
    embed_dim : int
        d.
    image_size : (int, int)
        Height and width of the image tower's input, pixels.
    context_length : int
        Tokens, start and end included.
    mean, std : (float, float, float)
        Of the RGB channels, in [0, 1].
    interpolation : {"bicubic", "bilinear"}
        Of the resize.
    resize_mode : {"shortest", "longest", "squash"}
        Which side becomes the input's size.
    fill_color : int
        0 to 255: padding of ``longest``.
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    embed_dim: int
    image_size: tuple[int, int]
    context_length: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    fill_color: int


def read_clip_config(path: Path) -> ClipConfig:
    """Read open_clip's JSON.

    Raises
    ------
    ManifestError
        Where it is not such a JSON.
    UnsupportedModel
        Where it asks for what these towers cannot run: a Hugging Face text tower or tokenizer, CoCa, another
        vocabulary, an unknown resize or other preprocessing, pictures of another size than the tower's.
    """
    try:
        # Editors on Windows begin a file with a mark.
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        model_cfg, preprocess_cfg = document["model_cfg"], document.get("preprocess_cfg", {})
        vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
        embed_dim = int(model_cfg["embed_dim"])
        _check_reach(path.name, model_cfg, vision, text)
        _check_sizes(path.name, model_cfg)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path.name} is not an open_clip config: {error!r}") from error
    if text.get("vocab_size", 49408) != 49408:
        raise UnsupportedModel(f"{path.name}: the vocabulary must be CLIP's own, 49,408 tokens")
    interpolation = preprocess_cfg.get("interpolation", "bicubic")
    resize_mode = preprocess_cfg.get("resize_mode", "shortest")
    if interpolation not in ("bicubic", "bilinear") or resize_mode not in ("shortest", "longest", "squash"):
        raise UnsupportedModel(f"{path.name}: cannot resize by {interpolation!r}, {resize_mode!r}")
    unknown = sorted(set(preprocess_cfg) - PREPROCESS_KEYS)
    if unknown or preprocess_cfg.get("mode", "RGB") != "RGB":
        what = f"{', '.join(unknown)} is unknown" if unknown else "mode must be RGB"
        raise UnsupportedModel(f"{path.name}: preprocess_cfg: {what}")
    image_size = _pair(preprocess_cfg.get("size") or vision.get("image_size", 224))
    # A tower of timm's may take pictures of another size than its name says.
    if "timm_model_name" not in vision and image_size != _pair(vision.get("image_size", 224)):
        raise UnsupportedModel(
            f"{path.name}: preprocess_cfg has pictures of {image_size} pixels, the tower takes "
            f"{_pair(vision.get('image_size', 224))}"
        )
    return ClipConfig(
        model_cfg=model_cfg,
        preprocess_cfg=preprocess_cfg,
        embed_dim=embed_dim,
        image_size=image_size,
        context_length=int(text.get("context_length", 77)),
        mean=_triple(preprocess_cfg.get("mean") or OPENAI_DATASET_MEAN),
        std=_triple(preprocess_cfg.get("std") or OPENAI_DATASET_STD),
        interpolation=interpolation,
        resize_mode=resize_mode,
        fill_color=int(preprocess_cfg.get("fill_color", 0)),
    )


def _check_reach(name: str, model_cfg: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Raise UnsupportedModel where a config names what is not in the bundle: files, repositories, other tokenizers."""
    for section, key in (
        (text, "hf_model_name"), (text, "hf_tokenizer_name"), (text, "tokenizer_mode"), (model_cfg, "multimodal_cfg"),
    ):  # fmt: skip
        if section.get(key):
            raise UnsupportedModel(f"{name}: {key} is not supported")
    tower = vision.get("timm_model_name")
    if tower is not None and not _TIMM_NAME.fullmatch(str(tower)):
        # timm takes hf-hub: and local-dir: there.
        raise UnsupportedModel(f"{name}: timm_model_name {tower!r} is not the name of an architecture")
    options = text.get("tokenizer_kwargs") or {}
    other = sorted(key for key, value in options.items() if value and key not in TOKENIZER_KEYS)
    if other:
        raise UnsupportedModel(
            f"{name}: tokenizer_kwargs: {', '.join(other)} is not supported; the tokenizer is CLIP's own"
        )
    if options.get("clean", "lower") not in CLEANINGS:
        raise UnsupportedModel(
            f"{name}: tokenizer_kwargs: clean must be one of {', '.join(sorted(CLEANINGS))}"
        )


def _check_sizes(name: str, value: Any, key: str = "model_cfg") -> None:
    """Raise UnsupportedModel where a number would take all memory or time before the weights could belie it."""
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_sizes(name, item, str(inner))
    elif isinstance(value, list):
        for item in value:
            _check_sizes(name, item, key)
    elif isinstance(value, int | float) and value > (MAX_LAYERS if key == "layers" else MAX_SIZE):
        raise UnsupportedModel(f"{name}: {key} {value} is out of all proportion")


def build_clip(config: ClipConfig, weights: Path | None) -> nn.Module:
    """Build open_clip's model in eval mode, float32, on the CPU.

    Parameters
    ----------
    config : ClipConfig
        Of the model.
    weights : Path or None
        Safetensors, of any float type; None leaves the weights random.

    Raises
    ------
    UnsupportedModel
        Where open_clip cannot build it.
    ManifestError
        Where the weights do not fit the config.
    BundleFileError
        Where they are not safetensors.
    """
    import torch

    from services.encoding.trimmed_open_clip import open_clip, take_timm

    arguments = copy.deepcopy(config.model_cfg)
    custom_text = arguments.pop("custom_text", False)
    if "timm_model_name" in arguments["vision_cfg"]:
        take_timm()
        # Otherwise timm would download weights only to have them replaced.
        arguments["vision_cfg"]["timm_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    try:
        state = None
        if weights is not None:
            state = load_weights(weights, "pt")
            # First without memory: the sizes are the config's word, until the weights bear them out.
            with torch.device("meta"):
                sketch = kind(**copy.deepcopy(arguments))
            state = _in_layout_of(sketch, state)
            problem = misfit(_shapes(sketch.state_dict()), _shapes(state))
            if problem:
                raise ManifestError(f"{weights.name} does not fit its config: {problem}")
        model: nn.Module = kind(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        raise UnsupportedModel(f"open_clip cannot build this model: {error}") from error
    if state is not None:
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval().requires_grad_(False)


def _shapes(state: dict[str, Any]) -> dict[str, Sequence[int]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _in_layout_of(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return weights as the model names them; open_clip takes these forms, too."""
    from services.encoding.trimmed_open_clip import open_clip

    if all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        # Saved by an open_clip that knew one layout only.
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    # Buffers that transformers saved once, and scales that were saved as a list of one.
    state = {name: t for name, t in state.items() if name in expected or not name.endswith("position_ids")}
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(expected[name].shape)
    return state


def read_logit_scale(weights: Path) -> float:
    """Return the factor of cosines, exp(logit_scale), of open_clip's weights.

    Raises
    ------
    ManifestError
        Where they have none: they are not a CLIP model's.
    """
    with open_weights(weights, "pt") as file:
        found = sorted({"logit_scale", f"{_PARALLEL}logit_scale"} & set(file.keys()))
        if not found:
            raise ManifestError(f"{weights.name} has no logit_scale: not the weights of an open_clip model")
        return float(file.get_tensor(found[0]).float().exp())


def tower_fingerprint(config: Path, weights: Path) -> str:
    """Return the SHA-256 (hex) that identifies a pair of towers.

    It covers the canonical JSON of model_cfg and preprocess_cfg, then, by sorted name, every tensor's name,
    type, shape and bytes. The order of tensors in the file and its free-form metadata do not count.
    """
    document = json.loads(config.read_text(encoding="utf-8-sig"))
    digest = hashlib.sha256(canonical_json([document["model_cfg"], document.get("preprocess_cfg", {})]))
    header, data = read_header(weights)
    with weights.open("rb") as file:
        for name in sorted(header):
            entry = header[name]
            start, end = entry["data_offsets"]
            digest.update(canonical_json([name, entry["dtype"], entry["shape"]]))
            file.seek(data + start)
            digest.update(file.read(end - start))
    return digest.hexdigest()


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _triple(value: float | Sequence[float]) -> tuple[float, float, float]:
    values = [float(value)] * 3 if isinstance(value, int | float) else [float(v) for v in value]
    return values[0], values[1], values[2]
