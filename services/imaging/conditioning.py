"""From a request to what the UNet is conditioned on: hidden states, a joint embedding, or both, steered."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from services.dictionaries.base import Dictionary
from services.errors import InvalidInput, SteeringUnsupported, TextTooLong
from services.imaging.edits import FromReference, ImageRequest, SteeringPath
from services.imaging.embedder import Embedder
from services.imaging.features import Features
from services.imaging.pipeline import STABLE_UNCLIP, Parts
from services.imaging.prompt_path import hidden_change, steered_hidden_states
from services.imaging.steering import Embedding, Steered, steer

# Prompts are few and come again (the empty one with every request).
REMEMBERED_PROMPTS = 64

# The pipeline's text encoder is the tower in another code base: half-precision storage is all that may differ.
SAME_TOWER_COSINE = 0.999


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is conditioned on; the first row is the unconditional side where there is guidance.

    Attributes
    ----------
    hidden : float tensor, shape (rows, length, width)
        Hidden states of the texts; rows is 2 with guidance, else 1.
    embedding : float tensor, shape (rows, d), or None
        Unnormalised joint embedding; None for a pipeline that takes none.
    has_embedding : tuple of bool, length rows
        False where the row's embedding is the null one, which unCLIP tells by a null noise level; contrastive guidance
        adds the opposite change to it.
    guidance_scale : float
        1 is none.
    steered : Steered or None
        What the edits did; None without edits.
    """

    hidden: Float[Tensor, "rows length width"]
    embedding: Float[Tensor, "rows d"] | None
    has_embedding: tuple[bool, ...]
    guidance_scale: float
    steered: Steered | None = None

    @property
    def delta(self) -> float:
        """||e' - e|| / rho; 0 without edits."""
        return 0.0 if self.steered is None else self.steered.delta


class Conditioner:
    """Makes conditionings; deterministic, one request at a time.

    Parameters
    ----------
    parts : Parts
        The pipeline.
    embedder : Embedder
        The bundle's towers.
    features : Features
        What the embedder's embeddings are edited by.
    """

    def __init__(
        self,
        parts: Parts,
        embedder: Embedder,
        features: Features,
    ) -> None:
        self._parts = parts
        self._embedder = embedder
        self._features = features
        self._prompts: OrderedDict[str, tuple[Tensor, int]] = OrderedDict()
        self.takes_embedding = parts.entry.pipeline == STABLE_UNCLIP or parts.entry.ip_adapter is not None
        self.refusals = self._refusals(features.tower_fingerprint)

    @property
    def paths(self) -> tuple[SteeringPath, ...]:
        """The paths by which this pipeline can be steered."""
        return tuple(path for path, why in self.refusals.items() if why is None)

    def __call__(self, request: ImageRequest, given: Steered | None = None) -> Conditioning:
        """Return what conditions the image of `request`; `given` takes the place of edits on the path `embedding`.

        Raises
        ------
        InvalidInput
            With a path such as ``prompt`` or ``steering.edits[0].strength``.
        SteeringUnsupported
            Where the pipeline cannot be steered like that.
        """
        guidance = (
            self._parts.entry.guidance_scale if request.guidance_scale is None else request.guidance_scale
        )
        hidden, end = self._encode(request.prompt, "prompt", request.truncate)
        negative, negative_end = self._encode(request.negative_prompt, "negative_prompt", request.truncate)
        base = self._base(request)
        steering, steered = request.steering, None
        embedding, opposite = None, None
        if self.takes_embedding:
            embedding = None if base is None else _vector(base)
        if steering:
            path = steering.path or self._parts.entry.conditioning
            change, steered = self._change(request, base, path)
            contrastive = steering.guidance == "contrastive"
            if path == "embedding" and steered.delta:
                embedding = torch.from_numpy(steered.unit) * steered.norm
                opposite = -change if contrastive else None
                # Features may say anything; an attribute leaves the thing what it is, and so its words.
                hidden = self._faded(hidden, steered) if steering.edits else hidden
            elif steered.delta:
                moved = hidden_change(self._projection(), change)
                hidden = steered_hidden_states(hidden, end, moved)
                if contrastive:
                    negative = steered_hidden_states(negative, negative_end, -moved)
        elif given is not None:
            steered, embedding = given, torch.from_numpy(given.unit) * given.norm
            hidden = self._faded(hidden, given)
        rows = [(hidden, embedding, embedding is not None)]
        if guidance > 1:
            # Null, and the opposite change: at strength 0 it is the null that guidance subtracts without edits.
            rows.insert(0, (negative, opposite, False))
        return Conditioning(
            torch.stack([row[0] for row in rows]),
            self._embeddings([row[1] for row in rows]),
            tuple(row[2] for row in rows),
            guidance,
            steered,
        )

    def _change(self, request: ImageRequest, base: Embedding | None, path: str) -> tuple[Tensor, Steered]:
        """Return delta e, unnormalised, shape (d,), and what the edits did."""
        refusal = self.refusals.get("embedding" if path == "embedding" else "prompt")
        if refusal is not None:
            # A new one each time: one that was raised holds the frames of its request, pictures and all.
            raise SteeringUnsupported(refusal.message, refusal.violations, reason=refusal.reason)
        if path == "prompt":
            base = self._prompt_embedding(request)
        elif base is None:
            message = "this pipeline is steered from a reference picture; give one"
            raise InvalidInput(message, [("image", message)], reason="REFERENCE_REQUIRED")
        dictionary, space = self._features.of(request.steering.dictionary)

        def encode_reference(reference: FromReference) -> NDArray[np.float32]:
            return activations(dictionary, self._embedder.reference(reference, request.truncate))

        try:
            steered = steer(base, activations(dictionary, base), request.steering, space, encode_reference)
        except InvalidInput as error:
            raise error.moved(lambda path: f"steering.{path}") from error
        return (torch.from_numpy(steered.unit) - torch.from_numpy(base.unit)) * base.norm, steered

    def _faded(self, hidden: Tensor, steered: Steered) -> Tensor:
        """Return the prompt's hidden states on their way to the empty prompt's, as far as the dose says.

        The words still describe the picture without the edits, and would hold it in place; what they say is in the
        embedding too.
        """
        known = self._features.attributes
        if known is None or not known.config.fade or steered.dose is None:
            return hidden
        return torch.lerp(hidden, self._encode("", "prompt")[0], min(1.0, steered.dose / known.config.fade))

    def _base(self, request: ImageRequest) -> Embedding | None:
        """Return the embedding that conditions the image before it is steered; None for the null one."""
        if request.image is not None:
            if not self.takes_embedding:
                message = "this pipeline takes no reference picture"
                raise InvalidInput(message, [("image", message)], reason="REFERENCE_UNSUPPORTED")
            try:
                return self._embedder.image(request.image)
            except InvalidInput as error:
                raise error.at("image.data") from error
        if self.takes_embedding and self._parts.entry.embedding_from_prompt:
            return self._prompt_embedding(request)
        return None

    def _prompt_embedding(self, request: ImageRequest) -> Embedding:
        try:
            return self._embedder.text(request.prompt, request.truncate)
        except TextTooLong as error:
            raise error.at("prompt") from error

    def _embeddings(self, rows: list[Tensor | None]) -> Tensor | None:
        if not self.takes_embedding:
            return None
        zeros = torch.zeros(self._embedding_dim())
        return torch.stack([zeros if row is None else row.float() for row in rows])

    def _embedding_dim(self) -> int:
        return self._features.embed_dim

    def _projection(self) -> Tensor:
        if self._embedder.projection is None:
            raise SteeringUnsupported("the text tower has no linear projection to steer through")
        return self._embedder.projection

    @torch.inference_mode()
    def _encode(self, text: str, field_path: str, truncate: bool = True) -> tuple[Tensor, int]:
        """Return final hidden states, shape (length, width), float32 on the CPU, and the end token's place."""
        if text in self._prompts:
            self._prompts.move_to_end(text)
            return self._prompts[text]
        parts = self._parts
        length = parts.tokenizer.model_max_length
        ids = parts.tokenizer(text, truncation=True, max_length=length + 1)["input_ids"]
        if len(ids) > length and not truncate:
            message = f"more tokens than the {length} that the pipeline reads"
            raise TextTooLong(message, [(field_path, message)])
        tokens = parts.tokenizer(
            text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )["input_ids"]
        hidden = parts.text_encoder(tokens.to(parts.device))[0][0].float().cpu()
        end = int((tokens[0] == parts.tokenizer.eos_token_id).int().argmax())
        if len(ids) <= length:
            self._prompts[text] = hidden, end
            if len(self._prompts) > REMEMBERED_PROMPTS:
                self._prompts.popitem(last=False)
        return hidden, end

    def _refusals(self, tower_fingerprint: str) -> dict[SteeringPath, SteeringUnsupported | None]:
        """Return why each path cannot be taken; None where it can."""
        if self._parts.entry.tower_fingerprint != tower_fingerprint:
            other = SteeringUnsupported(
                "the pipeline takes the embeddings of another tower than the one that the bundle's "
                "dictionaries were trained on, so its features do not exist there",
                reason="STEERING_TOWER_MISMATCH",
            )
            return {"embedding": other, "prompt": other}
        embedding = None
        if not self.takes_embedding:
            embedding = SteeringUnsupported(
                "this pipeline takes no embedding: steer it by the path `prompt`",
                reason="STEERING_PATH_UNSUPPORTED",
            )
        return {"embedding": embedding, "prompt": self._prompt_refusal()}

    def _prompt_refusal(self) -> SteeringUnsupported | None:
        reason = "STEERING_PATH_UNSUPPORTED"
        embedder, config = self._embedder, self._parts.text_encoder.config
        if config.hidden_size == embedder.text_width and config.num_hidden_layers == embedder.text_layers - 1:
            return SteeringUnsupported(
                "this pipeline reads its text tower's penultimate layer, as Stable Diffusion 2.x does; the "
                "embedding is a projection of the last one, so an edit of it cannot be carried there. Use the "
                "path `embedding` of a pipeline that has one",
                reason=reason,
            )
        other = SteeringUnsupported(
            "the pipeline's text encoder is not the bundle's text tower, so edits cannot take the path `prompt`",
            reason=reason,
        )
        if embedder.projection is None or config.hidden_size != embedder.text_width:
            return other
        hidden, end = self._encode("a red heart", "prompt")
        projected = embedder.projection @ hidden[end]
        expected = torch.from_numpy(embedder.text("a red heart").unit)
        cosine = torch.nn.functional.cosine_similarity(projected, expected, dim=0)
        return None if float(cosine) >= SAME_TOWER_COSINE else other


@torch.inference_mode()
def activations(dictionary: Dictionary, embedding: Embedding) -> NDArray[np.float32]:
    """Return z, shape (n,), of one embedding."""
    z = dictionary.encode(torch.from_numpy(embedding.unit)[None], embedding.modality)[0]
    result: NDArray[np.float32] = z.float().numpy()
    return result


def _vector(embedding: Embedding) -> Tensor:
    return torch.from_numpy(embedding.unit) * embedding.norm
