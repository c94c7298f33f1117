"""The generator's own towers: one input at a time, in float32, so that a request always gets the same numbers.

The encoder's towers may run in half precision and in batches whose sizes depend on who else calls; a picture
that must come out the same tomorrow cannot be conditioned on those.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from services.bundle.load import Bundle
from services.encoding.clip import build_clip
from services.encoding.images import DEFAULT_LIMITS, ImageLimits, ImagePreprocess, decode_image
from services.encoding.texts import DEFAULT_TEXT_LIMITS, TextLimits, Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.imaging.edits import FromReference
from services.imaging.steering import Embedding
from services.modality.modalities import Modality

# A reference comes again with every strength, a prompt with every seed; an embedding is a few kilobytes.
REMEMBERED = 256


class Embedder:
    """Embeds single images and texts.

    Parameters
    ----------
    bundle : Bundle
        Whose towers to load.
    device : str
        Where they run.
    image_limits : ImageLimits
        Of reference pictures.
    text_limits : TextLimits
        Of texts.

    Attributes
    ----------
    projection : float tensor, shape (d, width), or None
        W, from the text tower's final hidden states to embeddings; None where the tower has no linear one.
    text_layers, text_width : int
        Of the text tower.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        image_limits: ImageLimits = DEFAULT_LIMITS,
        text_limits: TextLimits = DEFAULT_TEXT_LIMITS,
    ) -> None:
        config = bundle.clip_config
        model: Any = build_clip(config, bundle.clip_weights)
        self.projection = _projection(model)
        self.text_layers = int(config.model_cfg["text_cfg"].get("layers", 12))
        self.text_width = int(config.model_cfg["text_cfg"].get("width", 512))
        self._towers = TorchTowers(model, config, device=device)
        self._preprocess = ImagePreprocess(config)
        self._image_limits = image_limits
        self._tokenizer = Tokenizer(config, text_limits)
        self._remembered: OrderedDict[object, Embedding] = OrderedDict()

    def _once(self, key: object, embed: Callable[[], Embedding]) -> Embedding:
        if key not in self._remembered:
            self._remembered[key] = embed()
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]

    def image(self, data: bytes) -> Embedding:
        """Embed an encoded image file.

        Raises
        ------
        ImageError
            Where it is refused.
        """

        def embed() -> Embedding:
            pixels = self._preprocess(decode_image(data, self._image_limits))
            embeddings = self._towers.encode_images(pixels[None])
            return Embedding(embeddings.unit[0], float(embeddings.norm[0]), Modality.IMAGE)

        return self._once(hashlib.sha256(data).digest(), embed)

    def text(self, text: str, truncate: bool = False) -> Embedding:
        """Embed a text.

        Raises
        ------
        TextTooLong
            Where it does not fit the context and may not be cut.
        """

        def embed() -> Embedding:
            embeddings = self._towers.encode_texts(self._tokenizer.tokenize([text], truncate))
            return Embedding(embeddings.unit[0], float(embeddings.norm[0]), Modality.TEXT)

        return self._once((text, truncate), embed)

    def reference(self, reference: FromReference, truncate: bool = False) -> Embedding:
        """Embed the reference of an edit."""
        if reference.image is not None:
            return self.image(reference.image)
        return self.text(reference.text or "", truncate)


def _projection(model: Any) -> Float[Tensor, "d width"] | None:
    tower = getattr(model, "text", model)
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        return None if projection.bias is not None else projection.weight.detach().float()
    return None if projection is None else torch.as_tensor(projection).detach().float().T
