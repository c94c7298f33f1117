"""A tiny random pipeline on any bundle's towers, in diffusers' folder layout: what a user might bring."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from services.bundle.load import CLIP_CONFIG, CLIP_WEIGHTS, Bundle
from services.encoding.clip import build_clip, read_clip_config
from tests.support.tiny_pipeline import make_scheduler, make_unet, make_vae, unclip_parts


def write_own_pipeline(folder: Path, bundle: Bundle, fingerprint: str = "", seed: int = 0) -> Path:
    """Write an unCLIP pipeline for the embeddings of the bundle's towers; `fingerprint` says others."""
    from diffusers import StableUnCLIPImg2ImgPipeline

    from services.imaging.text_encoder import build_tokenizer, convert_text_tower

    torch.manual_seed(seed)
    config = read_clip_config(bundle.path / CLIP_CONFIG)
    text_encoder = convert_text_tower(build_clip(config, bundle.path / CLIP_WEIGHTS), config)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=None,
        tokenizer=build_tokenizer(config.context_length),
        text_encoder=text_encoder,
        unet=make_unet(True, text_encoder.config.hidden_size, config.embed_dim),
        vae=make_vae(),
        scheduler=make_scheduler(),
        **unclip_parts(config.embed_dim),
    ).save_pretrained(folder, safe_serialization=True)
    description = {
        "pipeline": "StableUnCLIPImg2ImgPipeline",
        "conditioning": "embedding",
        "tower_fingerprint": fingerprint or bundle.manifest.clip.fingerprint,
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    (folder / "monofacet.json").write_text(json.dumps(description))
    return folder
