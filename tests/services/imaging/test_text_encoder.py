"""The converted text tower against open_clip's own."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from services.encoding.clip import ClipConfig, build_clip
from services.encoding.text_tower import TextTower
from services.encoding.texts import Tokenizer
from services.errors import UnsupportedModel
from services.imaging.text_encoder import build_tokenizer, convert_text_tower, hidden_states

CAPTIONS = [
    "woman firefighter medium-dark skin tone",
    "man's shoe",
    "flag: Côte d'Ivoire",
    "keycap #",
    "",
    "2nd",
]
CONTEXT = 20


def clip_config(**text: object) -> ClipConfig:
    model_cfg = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, **text
        },
    }  # fmt: skip
    return ClipConfig(model_cfg, {}, 12, (16, 16), CONTEXT, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash", 0)


@pytest.fixture(scope="module")
def tower() -> tuple[open_clip.CLIP, ClipConfig]:
    torch.manual_seed(0)
    config = clip_config()
    model = build_clip(config, None)
    # Trained norms are not the identity they start as.
    for block in model.transformer.resblocks:
        torch.nn.init.normal_(block.ln_1.weight)
        torch.nn.init.normal_(block.attn.in_proj_bias)
    return model, config


def test_converted_tower_gives_the_same_token_states_and_embedding(
    tower: tuple[open_clip.CLIP, ClipConfig],
) -> None:
    model, config = tower
    tokens = torch.from_numpy(Tokenizer(config).tokenize(CAPTIONS))
    converted = convert_text_tower(model, config)
    x = model.token_embedding(tokens) + model.positional_embedding
    expected = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    # float32: another order of the same sums.
    torch.testing.assert_close(hidden_states(converted, tokens), expected, atol=1e-5, rtol=1e-5)
    pooled = converted(tokens).pooler_output @ model.text_projection
    torch.testing.assert_close(pooled, TextTower(model)(tokens), atol=1e-5, rtol=1e-5)


def test_tokenizer_gives_the_same_tokens(tmp_path: Path, tower: tuple[open_clip.CLIP, ClipConfig]) -> None:
    build_tokenizer(CONTEXT).save_pretrained(tmp_path)
    from transformers import CLIPTokenizer

    stock = CLIPTokenizer.from_pretrained(tmp_path)
    found = stock(CAPTIONS, padding="max_length", truncation=True, return_tensors="np").input_ids
    assert (found == Tokenizer(tower[1]).tokenize(CAPTIONS)).all()


def test_tower_that_is_not_causal_is_refused() -> None:
    config = clip_config(no_causal_mask=True)
    with pytest.raises(UnsupportedModel, match="causal"):
        convert_text_tower(build_clip(config, None), config)
