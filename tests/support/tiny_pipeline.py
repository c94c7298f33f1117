"""Tiny random pipelines in diffusers' own folder layout, to go into a tiny bundle: what generation tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import open_clip.tokenizer
import safetensors.torch
import torch

from services.bundle.load import CLIP_CONFIG, CLIP_WEIGHTS, Bundle, refresh_manifest
from services.encoding.clip import build_clip, read_clip_config
from services.imaging.statistics import ActivationStatistics
from services.modality.modalities import Modality
from tests.support.tiny_bundle import CAPTIONS, EMBED_DIM, MODEL, draw

Kind = Literal["unclip", "sd1", "sd2", "ip-adapter"]

WIDTH = int(MODEL["text_cfg"]["width"])  # type: ignore[index]
CONTEXT = int(MODEL["text_cfg"]["context_length"])  # type: ignore[index]
LAYERS = int(MODEL["text_cfg"]["layers"])  # type: ignore[index]


def add_tiny_pipeline(bundle: Bundle, kind: Kind = "unclip", *, seed: int = 0, **entry: Any) -> Bundle:
    """Add a random pipeline and the quantiles of the `sae` dictionary to a tiny bundle; return it, reloaded.

    Parameters
    ----------
    bundle
        Made by `make_tiny_bundle`; changed in place.
    kind
        "unclip": StableUnCLIPImg2ImgPipeline; "sd1": StableDiffusionPipeline on the bundle's own text tower;
        "sd2": the same with its last layer left out, as Stable Diffusion 2.x has it; "ip-adapter": "sd1" with
        an IP-Adapter.
    seed
        Of the weights.
    **entry
        Changes to `diffusion/monofacet.json`.
    """
    torch.manual_seed(seed)
    folder = bundle.path / "diffusion"
    folder.mkdir()
    unclip = kind == "unclip"
    unet = make_unet(unclip)
    parts = {
        "unet": unet,
        "vae": make_vae(),
        "text_encoder": text_encoder(bundle.path, LAYERS - (kind == "sd2")),
        "scheduler": make_scheduler(),
    }
    index: dict[str, Any] = {
        "_class_name": "StableUnCLIPImg2ImgPipeline" if unclip else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "feature_extractor": [None, None],
    }
    if unclip:
        parts |= unclip_parts()
        index |= {
            "image_encoder": [None, None],
            "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
            "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        }
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    description: dict[str, Any] = {
        "pipeline": index["_class_name"],
        "conditioning": "embedding" if kind in ("unclip", "ip-adapter") else "prompt",
        "tower_fingerprint": bundle.manifest.clip.fingerprint,
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_height": 32,
        "max_width": 32,
        "embedding_from_prompt": unclip,
    }
    if kind == "ip-adapter":
        write_ip_adapter(folder / "ip_adapter" / "adapter.safetensors", unet)
        description["ip_adapter"] = "ip_adapter/adapter.safetensors"
    (folder / "monofacet.json").write_text(json.dumps({**description, **entry}, indent=1))
    write_statistics(bundle)
    refresh_manifest(bundle.path)
    return Bundle.load(bundle.path)


def make_unet(unclip: bool, width: int = WIDTH, embed_dim: int = EMBED_DIM) -> Any:
    from diffusers import UNet2DConditionModel

    extra = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * embed_dim}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
        **(extra if unclip else {}),
    )


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def make_scheduler() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def unclip_parts(embed_dim: int = EMBED_DIM) -> dict[str, Any]:
    from diffusers import DDPMScheduler
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    normalizer = StableUnCLIPImageNormalizer(embedding_dim=embed_dim)
    with torch.no_grad():
        normalizer.mean.normal_(0, 0.1)
        normalizer.std.uniform_(0.5, 1.5)
    return {
        "image_normalizer": normalizer,
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


def text_encoder(bundle: Path, layers: int) -> Any:
    """Return the bundle's text tower as transformers' CLIPTextModel, of its first `layers` layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model: Any = build_clip(read_clip_config(bundle / CLIP_CONFIG), bundle / CLIP_WEIGHTS)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0,
    )
    made = CLIPTextModel(config).eval()
    names = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        "final_layer_norm.weight": model.ln_final.weight,
        "final_layer_norm.bias": model.ln_final.bias,
    }
    for i, block in enumerate(model.transformer.resblocks[:layers]):
        layer = f"encoder.layers.{i}"
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for key, weight, bias in zip("qkv", weights, biases, strict=True):
            names[f"{layer}.self_attn.{key}_proj.weight"] = weight
            names[f"{layer}.self_attn.{key}_proj.bias"] = bias
        for ours, theirs in (
            ("self_attn.out_proj", block.attn.out_proj),
            ("layer_norm1", block.ln_1),
            ("layer_norm2", block.ln_2),
            ("mlp.fc1", block.mlp.c_fc),
            ("mlp.fc2", block.mlp.c_proj),
        ):
            names[f"{layer}.{ours}.weight"] = theirs.weight
            names[f"{layer}.{ours}.bias"] = theirs.bias
    state = made.state_dict()
    # transformers has moved these modules below `text_model` and back.
    prefix = "text_model." if any(key.startswith("text_model.") for key in state) else ""
    with torch.no_grad():
        for name, value in names.items():
            state[prefix + name].copy_(value)
    return made


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's own vocabulary, as open_clip ships it, in transformers' form."""
    from transformers import CLIPTokenizer

    own = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in own.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1])]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!", model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(folder)


def write_ip_adapter(path: Path, unet: Any, tokens: int = 4) -> None:
    """Write random weights in the layout of h94/IP-Adapter: `image_proj.*` and `ip_adapter.<n>.*`."""
    state = {
        "image_proj.proj.weight": torch.randn(tokens * WIDTH, EMBED_DIM),
        "image_proj.proj.bias": torch.randn(tokens * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            module = unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k", "to_v"):
                size = getattr(module, key).weight.shape[0]
                state[f"ip_adapter.{number}.{key}_ip.weight"] = torch.randn(size, WIDTH) * 0.2
            number += 2
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file(state, str(path))


def write_statistics(bundle: Bundle) -> None:
    """Write the quantiles of the `sae` dictionary over a few pictures and captions."""
    from services.imaging.embedder import Embedder
    from tests.support.tiny_bundle import webp

    embedder = Embedder(bundle)
    dictionary = bundle.dictionary("sae")
    images = torch.stack([torch.from_numpy(embedder.image(webp(draw(i))).unit) for i in range(len(CAPTIONS))])
    texts = torch.stack([torch.from_numpy(embedder.text(caption).unit) for caption in CAPTIONS])
    statistics = ActivationStatistics.measure(
        dictionary.encode(images, Modality.IMAGE).numpy(), dictionary.encode(texts, Modality.TEXT).numpy()
    )
    statistics.write(
        bundle.path / "steering" / "sae.safetensors",
        dictionary="sae",
        tower_fingerprint=bundle.manifest.clip.fingerprint,
    )
