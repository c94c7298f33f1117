"""The bundle's open_clip text tower as transformers' `CLIPTextModel` and `CLIPTokenizer`, which pipelines expect.

The same numbers under other names, so that a bundle need not hold its text tower twice.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from services.encoding.clip import ClipConfig
from services.encoding.trimmed_open_clip import open_clip
from services.errors import UnsupportedModel

# open_clip's merges: the file holds a version line and more than CLIP uses.
MERGES = 49152 - 256 - 2
# A block of open_clip's transformer, and where transformers keeps the same weights.
RENAMED = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_text_tower(
    model: Any, config: ClipConfig, projecting: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return the text tower of an open_clip model as a `CLIPTextModel`.

    Its last hidden state equals the tower's token states after the final layer norm, and its pooled output, times the
    text projection, the tower's raw embedding.

    Parameters
    ----------
    model : open_clip.CLIP
        With a causal transformer that reads its result at the end token.
    config : ClipConfig
        Of the model.
    projecting : bool
        Return a `CLIPTextModelWithProjection` instead, whose ``text_embeds`` are the tower's raw embeddings.

    Raises
    ------
    UnsupportedModel
        Where the tower is not of CLIP's own form.
    """
    text = config.model_cfg["text_cfg"]
    if isinstance(model, open_clip.CustomTextCLIP) or getattr(model, "text_pool_type", "argmax") != "argmax":
        raise UnsupportedModel("only CLIP's own text tower, read at the end token, has a CLIPTextModel")
    if model.attn_mask is None:
        raise UnsupportedModel("the text tower is not causal, which CLIPTextModel always is")
    if projecting and not isinstance(model.text_projection, Tensor):
        raise UnsupportedModel("only a text tower with a linear projection has a CLIPTextModelWithProjection")
    width, layers = int(text["width"]), int(text["layers"])
    kind: Any = CLIPTextModelWithProjection if projecting else CLIPTextModel
    converted = kind(
        CLIPTextConfig(
            vocab_size=model.vocab_size,
            hidden_size=width,
            intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
            projection_dim=config.embed_dim,
            num_hidden_layers=layers,
            num_attention_heads=int(text["heads"]),
            max_position_embeddings=config.context_length,
            hidden_act="quick_gelu" if config.model_cfg.get("quick_gelu") else "gelu",
            pad_token_id=0,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    state = dict(_renamed(model, layers))
    found = converted.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in found) else ""
    state = {prefix + name: value for name, value in state.items()}
    if projecting:
        state["text_projection.weight"] = model.text_projection.detach().float().T.contiguous()
    converted.load_state_dict(state, strict=True)
    result: CLIPTextModel | CLIPTextModelWithProjection = converted.eval().requires_grad_(False)
    return result


def _renamed(model: Any, layers: int) -> list[tuple[str, Tensor]]:
    result = [
        ("embeddings.token_embedding.weight", model.token_embedding.weight),
        ("embeddings.position_embedding.weight", model.positional_embedding),
        ("final_layer_norm.weight", model.ln_final.weight),
        ("final_layer_norm.bias", model.ln_final.bias),
    ]
    for i in range(layers):
        block: nn.Module = model.transformer.resblocks[i]
        target = f"encoder.layers.{i}"
        for source, name in RENAMED.items():
            module = block.get_submodule(source)
            result += [(f"{target}.{name}.{kind}", getattr(module, kind)) for kind in ("weight", "bias")]
        attention: Any = block.get_submodule("attn")
        for kind, packed in (("weight", attention.in_proj_weight), ("bias", attention.in_proj_bias)):
            parts = packed.chunk(3)
            result += [
                (f"{target}.self_attn.{name}_proj.{kind}", part)
                for name, part in zip("qkv", parts, strict=True)
            ]
    return [(name, value.detach().clone().float()) for name, value in result]


def build_tokenizer(context_length: int) -> CLIPTokenizer:
    """Return CLIP's tokenizer as transformers has it, padded with zeros as open_clip pads.

    Parameters
    ----------
    context_length : int
        Tokens, start and end included.
    """
    source = Path(open_clip.tokenizer.default_bpe())
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    kind: Any = CLIPTokenizer
    tokenizer: CLIPTokenizer = kind(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        # "!" is token 0, which open_clip pads with, as in Stable Diffusion 2.
        pad_token="!",
        model_max_length=context_length,
    )
    return tokenizer


@torch.inference_mode()
def hidden_states(encoder: Any, tokens: Tensor, batch: int = 256) -> Tensor:
    """Return the states a pipeline's cross-attention sees, float32 [n, context, width]."""
    parts: Any = tokens.split(batch)  # type: ignore[no-untyped-call]
    return torch.cat([encoder(part).last_hidden_state for part in parts])
