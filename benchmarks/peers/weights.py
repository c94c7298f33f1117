"""One set of ViT-B-32 weights in open_clip's layout and in transformers'.

The two libraries name and pack the same tensors differently: open_clip keeps the projections transposed, and query,
key and value of a layer in one matrix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from torch import Tensor

from services.bundle.load import Bundle
from services.encoding.clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, ClipConfig, build_clip

# Measured for these weights: 8e-8, some units in the last of float32's 24 bits.
TOLERANCE = 1e-6

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def transformers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of open_clip's `CLIP` under the names, and in the packing, of transformers' `CLIPModel`."""
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _RENAMED:
            converted[_RENAMED[name]] = value
        elif name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = value.T
        elif ".resblocks." in name:
            converted.update(_of_a_block(name, value))
        elif name != "attn_mask":
            raise ValueError(f"no place for {name}")
    return {name: value.float().contiguous().clone() for name, value in converted.items()}


def _of_a_block(name: str, value: Tensor) -> dict[str, Tensor]:
    tower, inner = name.split(".resblocks.")
    number, part = inner.split(".", 1)
    target = ("vision_model" if tower.startswith("visual") else "text_model") + f".encoder.layers.{number}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return {
            f"{target}.self_attn.{letter}_proj.{kind}": piece
            for letter, piece in zip("qkv", value.chunk(3), strict=True)
        }
    module, kind = part.rsplit(".", 1)
    return {f"{target}.{_BLOCK[module]}.{kind}": value}


def transformers_config(config: ClipConfig) -> dict[str, Any]:
    """Return transformers' `config.json` of the same model."""
    vision, text = config.model_cfg["vision_cfg"], config.model_cfg["text_cfg"]
    activation = "quick_gelu" if config.model_cfg.get("quick_gelu") else "gelu"

    def side(width: int, layers: int, heads: int, more: dict[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
            "projection_dim": config.embed_dim,
            **more,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "torch_dtype": "float32",
        "vision_config": side(
            vision["width"],
            vision["layers"],
            vision["width"] // vision.get("head_width", 64),
            {
                "image_size": config.image_size[0],
                "patch_size": vision["patch_size"],
                "model_type": "clip_vision_model",
            },
        ),
        "text_config": side(
            text["width"],
            text["layers"],
            text["heads"],
            {
                "max_position_embeddings": config.context_length,
                "vocab_size": 49408,
                "bos_token_id": 49406,
                "eos_token_id": 49407,
                "model_type": "clip_text_model",
            },
        ),
    }


def preprocessor_config(config: ClipConfig) -> dict[str, Any]:
    """Return transformers' `preprocessor_config.json`: resize by the short side, crop, scale, normalise."""
    side = config.image_size[0]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(OPENAI_DATASET_MEAN),
        "image_std": list(OPENAI_DATASET_STD),
    }


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write CLIP's vocabulary, as open_clip ships it, in transformers' form."""
    own = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in own.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def write_transformers(bundle: Bundle, folder: Path) -> Path:
    """Write a bundle's towers as a folder that `CLIPModel.from_pretrained` reads; float32."""
    folder.mkdir(parents=True, exist_ok=True)
    state = safetensors.torch.load_file(str(bundle.clip_weights))
    converted = transformers_state(state)
    safetensors.torch.save_file(converted, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(transformers_config(bundle.clip_config), indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(bundle.clip_config)))
    write_tokenizer(folder, bundle.clip_config.context_length)
    return folder


def difference(bundle: Bundle, folder: Path, images: int = 4) -> float:
    """Return the largest difference of a coordinate of a unit embedding, images and texts, between the two layouts."""
    from transformers import CLIPModel

    config = bundle.clip_config
    ours: Any = build_clip(config, bundle.clip_weights)
    theirs: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.standard_normal((images, 3, *config.image_size)).astype(np.float32))
    tokens = torch.zeros(images, config.context_length, dtype=torch.int64)
    tokens[:, :6] = torch.from_numpy(rng.integers(1, 49406, (images, 6)))
    tokens[:, 6] = 49407
    with torch.inference_mode():
        pairs = [
            (ours.encode_image(pixels), _tensor(theirs.get_image_features(pixel_values=pixels))),
            (ours.encode_text(tokens), _tensor(theirs.get_text_features(input_ids=tokens))),
        ]
    normalise = torch.nn.functional.normalize
    return max(float((normalise(a) - normalise(b)).abs().max()) for a, b in pairs)


def _tensor(answer: Any) -> Tensor:
    # transformers 5 wraps what earlier versions returned bare.
    value: Tensor = answer if isinstance(answer, Tensor) else answer.pooler_output
    return value
