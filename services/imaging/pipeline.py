"""The parts of a Stable Diffusion pipeline, loaded from diffusers' folder layout; safetensors only.

The parts are loaded one by one, of the classes named here and no others: the folder says which schedulers and
sizes, never which code. diffusers is imported when a pipeline is loaded, since that takes seconds.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.bundle.load import Bundle
from services.bundle.manifest import DiffusionEntry
from services.encoding.clip import build_clip
from services.errors import ManifestError, UnsafeWeights, UnsupportedModel
from services.imaging.folder import check_configs, read_json, weights_variant
from services.weights import load_weights

STABLE_DIFFUSION = "StableDiffusionPipeline"
STABLE_UNCLIP = "StableUnCLIPImg2ImgPipeline"
PIPELINES = (STABLE_DIFFUSION, STABLE_UNCLIP)

SCHEDULERS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)


@dataclass(frozen=True)
class Parts:
    """A pipeline in parts, in eval mode, on one device.

    Attributes
    ----------
    entry : DiffusionEntry
        What the manifest says of it.
    unet, vae, text_encoder : nn.Module
        UNet2DConditionModel, AutoencoderKL, CLIPTextModel.
    tokenizer : CLIPTokenizer
        Of the text encoder.
    scheduler : SchedulerMixin
        Prototype; every image runs a copy.
    image_normalizer, image_noising_scheduler : object or None
        unCLIP: what adds noise to the embedding.
    device : torch.device
        Where they are.
    dtype : torch.dtype
        Of weights and activations.
    """

    entry: DiffusionEntry
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    image_normalizer: Any
    image_noising_scheduler: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.unet.config.in_channels)

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """Return a scheduler of its own for one image, with its timesteps set."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        return scheduler


def load_parts(
    folder: Path, entry: DiffusionEntry, device: str = "cpu", bundle: Bundle | None = None
) -> Parts:
    """Load a pipeline.

    Parameters
    ----------
    folder : Path
        In diffusers' layout, already verified.
    entry : DiffusionEntry
        What the manifest says of it.
    device : str
        "cpu" (float32) or a GPU (float16).
    bundle : Bundle or None
        Whose text tower a pipeline without a text encoder reads prompts by.

    Raises
    ------
    ManifestError
        Where the folder and the manifest disagree, or a part does not load.
    UnsupportedModel
        For a pipeline or a part of a class that is not served.
    UnsafeWeights
        Where a part has no safetensors.
    """
    index = read_json(folder / "model_index.json")
    if entry.pipeline not in PIPELINES:
        raise UnsupportedModel(f"pipeline must be one of {', '.join(PIPELINES)}, not {entry.pipeline!r}")
    if index.get("_class_name") != entry.pipeline:
        raise ManifestError(
            f"the folder holds a {index.get('_class_name')!r}",
            [("diffusion.pipeline", f"is not {entry.pipeline}")],
        )
    _check_entry(entry)
    check_configs(folder)
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    for library in (diffusers, transformers):
        chatter: Any = library.utils.logging
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.float16

    def model(name: str, kind: Any) -> Any:
        return _load_model(folder, index, name, kind, dtype).to(device).eval().requires_grad_(False)

    try:
        unclip = entry.pipeline == STABLE_UNCLIP
        if lacks_text_encoder(index):
            encoder, tokenizer = _text_tower(bundle, entry)
            encoder = encoder.to(device, dtype)
        else:
            encoder = model("text_encoder", transformers.CLIPTextModel)
            tokenizer = transformers.CLIPTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True
            )
        parts = Parts(
            entry=entry,
            unet=model("unet", diffusers.UNet2DConditionModel),
            vae=model("vae", diffusers.AutoencoderKL),
            text_encoder=encoder,
            tokenizer=tokenizer,
            scheduler=_scheduler(folder, index, "scheduler", entry.scheduler),
            image_normalizer=_normalizer(folder, index, StableUnCLIPImageNormalizer, device, dtype)
            if unclip
            else None,
            image_noising_scheduler=_scheduler(folder, index, "image_noising_scheduler") if unclip else None,
            device=torch.device(device),
            dtype=dtype,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ManifestError(f"the pipeline cannot be loaded: {_first_line(error)}") from error
    if entry.ip_adapter is not None:
        _load_ip_adapter(parts, folder / entry.ip_adapter)
    _check_parts(parts)
    return parts


def lacks_text_encoder(index: dict[str, Any]) -> bool:
    """Return whether a pipeline, by its ``model_index.json``, leaves prompts to the bundle's own text tower."""
    return all((index.get(name) or [None, None])[1] is None for name in ("text_encoder", "tokenizer"))


def _text_tower(bundle: Bundle | None, entry: DiffusionEntry) -> tuple[Any, Any]:
    """Return the bundle's text tower as a pipeline has it, and its tokenizer."""
    from services.imaging.text_encoder import build_tokenizer, convert_text_tower

    if bundle is None or bundle.manifest.clip.fingerprint != entry.tower_fingerprint:
        raise ManifestError(
            "the pipeline has no text encoder, and was made for other towers than the bundle's",
            [("diffusion.tower_fingerprint", "is not that of the bundle's towers")],
        )
    config = bundle.clip_config
    tower = convert_text_tower(build_clip(config, bundle.clip_weights), config)
    return tower, build_tokenizer(config.context_length)


def _first_line(error: Exception) -> str:
    """Return what a library said, without the rest of its advice and without paths of this machine."""
    said = str(error).strip().splitlines()
    words = [word for word in (said[0] if said else "").split() if "/" not in word]
    return f"{type(error).__name__}: {' '.join(words)[:200]}"


def _load_model(folder: Path, index: dict[str, Any], name: str, kind: Any, dtype: torch.dtype) -> Any:
    _check_class(index, name, kind.__name__)
    variant = weights_variant(folder / name)
    # diffusers names the type of weights `torch_dtype`, transformers `dtype`.
    key = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return kind.from_pretrained(
            folder / name, local_files_only=True, use_safetensors=True, variant=variant, **{key: dtype}
        )


def _normalizer(folder: Path, index: dict[str, Any], kind: Any, device: str, dtype: torch.dtype) -> Any:
    normalizer = _load_model(folder, index, "image_normalizer", kind, dtype)
    # Its own `to` takes exactly a device and a type.
    return normalizer.to(device, dtype).eval().requires_grad_(False)


def _scheduler(folder: Path, index: dict[str, Any], name: str, replacement: str | None = None) -> Any:
    import diffusers

    own = (index.get(name) or [None, None])[1]
    chosen = replacement or own
    if chosen not in SCHEDULERS:
        raise UnsupportedModel(f"{name} {chosen!r} is not one of {', '.join(sorted(SCHEDULERS))}")
    return getattr(diffusers, chosen).from_config(read_json(folder / name / "scheduler_config.json"))


def _load_ip_adapter(parts: Parts, weights: Path) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0

    if weights.suffix != ".safetensors":
        raise UnsafeWeights(
            "the IP-Adapter must be safetensors", [("diffusion.ip_adapter", "not safetensors")]
        )
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    try:
        for key, value in load_weights(weights, "pt").items():
            section, _, name = key.partition(".")
            state[section][name] = value.to(parts.dtype)
        parts.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ManifestError(
            "the IP-Adapter does not fit the pipeline", [("diffusion.ip_adapter", "bad")]
        ) from error
    for processor in parts.unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor | IPAdapterAttnProcessor2_0):
            processor.scale = [parts.entry.ip_adapter_scale]
    parts.unet.eval().requires_grad_(False)


def _check_class(index: dict[str, Any], name: str, expected: str) -> None:
    found = (index.get(name) or [None, None])[1]
    # The folder of a text encoder may name its projecting sibling, whose hidden states are the same.
    if found not in (expected, f"{expected}WithProjection"):
        raise UnsupportedModel(f"{name} must be a {expected}, not {found!r}")


def _check_entry(entry: DiffusionEntry) -> None:
    problems = []
    if entry.conditioning not in ("embedding", "prompt"):
        problems.append(("conditioning", "must be embedding or prompt"))
    if entry.conditioning == "embedding" and entry.pipeline == STABLE_DIFFUSION and entry.ip_adapter is None:
        problems.append(
            ("ip_adapter", "a StableDiffusionPipeline takes embeddings through an IP-Adapter only")
        )
    if entry.ip_adapter is not None and entry.pipeline != STABLE_DIFFUSION:
        problems.append(("ip_adapter", "belongs to a StableDiffusionPipeline"))
    if not 1 <= entry.num_inference_steps <= entry.max_inference_steps <= 1000:
        problems.append(("num_inference_steps", "must be 1 to max_inference_steps, and that at most 1000"))
    if not 0 <= entry.noise_level < 1000:
        problems.append(("noise_level", "must be 0 to 999"))
    if min(entry.height, entry.width) < 8 or entry.height % 8 or entry.width % 8:
        problems.append(("height", "height and width must be positive multiples of 8"))
    if problems:
        raise ManifestError(
            "; ".join(f"diffusion.{key}: {what}" for key, what in problems),
            [(f"diffusion.{key}", what) for key, what in problems],
        )


def _check_parts(parts: Parts) -> None:
    config = parts.unet.config
    problems = []
    if parts.unet.config.cross_attention_dim != parts.text_encoder.config.hidden_size:
        problems.append("the UNet's cross-attention and the text encoder differ in width")
    if (config.class_embed_type == "projection") != (parts.entry.pipeline == STABLE_UNCLIP):
        problems.append("the UNet's class embedding is not that of the pipeline")
    if config.in_channels != parts.vae.config.latent_channels:
        problems.append("the UNet and the autoencoder differ in latent channels")
    if config.addition_embed_type is not None or config.time_cond_proj_dim is not None:
        problems.append("a UNet with additional embeddings is not served")
    if problems:
        raise UnsupportedModel("; ".join(problems))
