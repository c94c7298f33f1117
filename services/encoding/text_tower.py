"""The text tower as one module that takes tokens of any length up to the context."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from services.encoding.trimmed_open_clip import open_clip
from services.errors import UnsupportedModel


class TextTower(nn.Module):
    """Tokens to raw embeddings, by either of open_clip's two layouts.

    open_clip's `CLIP` keeps the parts of its text tower on itself and only takes the full context; this runs
    the same parts on as many positions as there are tokens.

    Parameters
    ----------
    model : open_clip.CLIP or open_clip.CustomTextCLIP
        Whose text tower to take.

    Attributes
    ----------
    causal : bool
        Whether tokens see only what is before them, so that padding after the end may be left out.
    """

    attn_mask: Tensor | None

    def __init__(self, model: Any) -> None:
        super().__init__()
        # By its layout and not by its class: a model may come of the whole open_clip as well as of the part served.
        tower = getattr(model, "text", model)
        if getattr(tower, "cls_emb", None) is not None:
            raise UnsupportedModel("a text tower with a class token is not supported")
        self.token_embedding: nn.Module = tower.token_embedding
        self.positional_embedding: Tensor = tower.positional_embedding
        self.transformer: nn.Module = tower.transformer
        self.ln_final: nn.Module = tower.ln_final
        self.text_projection: nn.Linear | Tensor | None = tower.text_projection
        self.pool_type: str = getattr(tower, "text_pool_type", None) or tower.pool_type
        self.eos_id: int | None = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        mask = getattr(tower, "attn_mask", None)
        self.causal = mask is not None and self.pool_type in ("argmax", "eos")
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch d"]:
        """Return raw embeddings."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        pooled: Tensor = open_clip.transformer.text_global_pool(
            x, tokens, self.pool_type, eos_token_id=self.eos_id
        )
        if self.text_projection is None:
            return pooled
        if isinstance(self.text_projection, nn.Linear):
            projected: Tensor = self.text_projection(pooled)
            return projected
        return torch.matmul(pooled, self.text_projection)
