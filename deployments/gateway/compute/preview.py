"""What edits do in feature space: one forward of the encoder, then the steering maths in the gateway."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import numpy as np
from monofacet.v1 import common_pb2
from numpy.typing import NDArray

from deployments.encoder.tasks import EncodeTask, Features
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.decoders import Decoders
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.messages import check_texts, items_of
from deployments.operations.settings import Settings
from services.errors import InvalidInput
from services.imaging.edits import FromReference, Steering
from services.imaging.features import feature_space
from services.imaging.steering import Embedding, FeatureSpace, Steered, steer
from services.modality.modalities import Modality

# Captions that neighbours are sought among: enough to place an embedding, few enough to encode in a second or two.
MAX_CAPTIONS = 2_000
# Captions that go to the encoder at once; calls of others fit in between.
_CHUNK = 64


@dataclass(frozen=True)
class SteeringPreview:
    """What edits do to an embedding.

    Attributes
    ----------
    dictionary
        Full name.
    steered
        What the edits did.
    captions, steered_captions
        Nearest captions before and after, with their cosines, nearest first.
    queue_s, inference_s
        Seconds.
    """

    dictionary: str
    steered: Steered
    captions: list[tuple[str, float]]
    steered_captions: list[tuple[str, float]]
    queue_s: float
    inference_s: float


class SteeringPreviews:
    """Previews edits.

    Parameters
    ----------
    encoder
        Encodes inputs, references and, once, captions.
    catalogue, decoders
        Labels, cards and rows of the dictionaries.
    settings
        Limits of texts.
    """

    def __init__(
        self, encoder: EncoderClient, catalogue: Catalogue, decoders: Decoders, settings: Settings
    ) -> None:
        self._encoder = encoder
        self._catalogue = catalogue
        self._decoders = decoders
        self._settings = settings
        self._spaces: dict[str, FeatureSpace] = {}
        self._captions: tuple[list[str], NDArray[np.float32]] | None = None
        # Rows of the first captions, while the others are still to be encoded.
        self._rows = [np.zeros((0, catalogue.bundle.clip_config.embed_dim), np.float32)]
        self._encoding = asyncio.Lock()
        self._stream = secrets.token_hex(8)

    async def preview(
        self,
        input: common_pb2.Input,
        steering: Steering,
        max_captions: int,
        truncate: bool,
        remaining_s: float | None,
    ) -> SteeringPreview:
        """Return what `steering` does to the embedding of `input`.

        Raises
        ------
        InvalidInput
            With a path such as ``input.image.data`` or ``steering.edits[0].strength``.
        """
        name = self._catalogue.resolve(steering.dictionary, "steering.dictionary")
        space = await self._space(name)
        references = [
            (i, edit.operation)
            for i, edit in enumerate(steering.edits)
            if isinstance(edit.operation, FromReference)
        ]
        own = items_of([input])
        items = (*own, *(_item(reference) for _, reference in references))
        places = ["input", *(f"steering.edits[{i}].reference" for i, _ in references)]
        try:
            check_texts(items, self._settings.max_text_bytes, truncate)
            encoded = await self._encoder.encode(EncodeTask(items, name, truncate_text=truncate), remaining_s)
        except InvalidInput as error:
            raise _replaced(error, places) from error
        z = [_dense(features, space.n_features) for features in encoded.features]
        known = {reference: row for (_, reference), row in zip(references, z[1:], strict=True)}
        modality = Modality.IMAGE if isinstance(items[0], bytes) else Modality.TEXT
        embedding = Embedding(encoded.unit[0], float(encoded.norm[0]), modality)
        try:
            steered = await asyncio.to_thread(steer, embedding, z[0], steering, space, known.__getitem__)
        except InvalidInput as error:
            raise error.moved(lambda path: f"steering.{path}") from error
        before, after = await self._near(max_captions, embedding.unit, steered.unit)
        return SteeringPreview(name, steered, before, after, encoded.queue_s, encoded.inference_s)

    async def _space(self, name: str) -> FeatureSpace:
        if name not in self._spaces:
            decoders = await self._decoders.get(name)
            self._spaces[name] = await asyncio.to_thread(
                feature_space, self._catalogue.bundle, name, lambda modality: decoders[modality].rows
            )
        return self._spaces[name]

    async def _near(self, count: int, *units: NDArray[np.float32]) -> list[list[tuple[str, float]]]:
        if not count:
            return [[] for _ in units]
        texts, embeddings = await self._known_captions()
        near = []
        for unit in units:
            cosines = embeddings @ unit
            order = np.argsort(-cosines, kind="stable")[:count]
            near.append([(texts[i], float(cosines[i])) for i in order])
        return near

    async def _known_captions(self) -> tuple[list[str], NDArray[np.float32]]:
        """Return captions and their unit embeddings, float32, shape (captions, d); encoded at the first call.

        What is encoded is kept when a call ends before its time, and the next call goes on from there: on a slow tower
        no call might live long enough for all. As a stream the captions wait where a call would be refused.
        """
        async with self._encoding:
            if self._captions is None:
                texts = captions(self._catalogue)
                for start in range(sum(map(len, self._rows)), len(texts), _CHUNK):
                    part = tuple(texts[start : start + _CHUNK])
                    task = EncodeTask(part, truncate_text=True, stream=self._stream)
                    self._rows.append((await self._encoder.encode_patiently(task)).unit)
                self._captions = texts, np.concatenate(self._rows)
                self._rows.clear()
        return self._captions


def captions(catalogue: Catalogue) -> list[str]:
    """Return the texts of the default dictionary's cards, each once, evenly thinned to `MAX_CAPTIONS`."""
    cards = catalogue.cards.get(catalogue.bundle.manifest.default_dictionary)
    if cards is None:
        return []
    texts = sorted(set(cards.table.column("text").to_pylist()) - {""})
    step = max(1, -(-len(texts) // MAX_CAPTIONS))
    return texts[::step]


def strongest(z: NDArray[np.float32], limit: int) -> Features:
    """Return the active features of dense activations, largest first, at most `limit` of them."""
    (active,) = np.nonzero(z)
    order = active[np.argsort(-z[active], kind="stable")][:limit]
    return Features(order.astype(np.int32), z[order])


def _item(reference: FromReference) -> bytes | str:
    return reference.image if reference.image is not None else reference.text or ""


def _dense(features: Features, n_features: int) -> NDArray[np.float32]:
    z = np.zeros(n_features, np.float32)
    z[features.indices] = features.values
    return z


def _replaced(error: InvalidInput, places: list[str]) -> InvalidInput:
    def move(path: str) -> str:
        number, _, rest = path.removeprefix("[").partition("]")
        known = number.isdigit() and int(number) < len(places)
        return places[int(number)] + rest if known else path

    return error.moved(move)
