"""ModalityService: which features are about images, which about text, and which about both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from monofacet.v1 import modality_service_pb2 as pb
from monofacet.v1 import modality_service_pb2_grpc

from deployments.encoder.tasks import EncodeTask
from deployments.gateway.admission.client_streams import ClientStreams
from deployments.gateway.admission.pairs import PairScores, score_settings
from deployments.gateway.bundles import Score
from deployments.gateway.cards import card, cards
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.modality import classify
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.interceptors.validation import validate
from deployments.gateway.listing import matching, ordered, page_start, page_token
from deployments.gateway.messages import check_texts, items_of, relocated, timings
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.errors import InvalidInput
from services.modality.tables import ModalityTable

_CLASSIFY = "monofacet.v1.ModalityService/ClassifyModality"
_SCORE = "monofacet.v1.ModalityService/ScoreModality"
_DEFAULT_PAGE = 50
_DEFAULT_TOP_FEATURES = 10
# More examples than any bundle holds.
_ALL_EXAMPLES = 1_000


class ModalityServicer(modality_service_pb2_grpc.ModalityServiceServicer):
    """Answers ModalityService.

    Parameters
    ----------
    encoder
        Where inputs are encoded.
    score
        Computes a modality table away from this event loop.
    catalogue
        Tables and cards.
    streams
        Admits streams of pairs.
    settings, metrics
        Of the server.
    """

    def __init__(
        self,
        encoder: EncoderClient,
        score: Score,
        catalogue: Catalogue,
        streams: ClientStreams,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._encoder = encoder
        self._score = score
        self._catalogue = catalogue
        self._streams = streams
        self._settings = settings
        self._metrics = metrics
        self._bundle = catalogue.bundle.id

    async def ListFeatures(  # noqa: N802
        self, request: pb.ListFeaturesRequest, context: Any
    ) -> pb.ListFeaturesResponse:
        """Return one page of cards."""
        name, table = self._catalogue.table(request.dictionary, "dictionary")
        start = page_start(request, self._bundle)
        size = min(request.page_size or _DEFAULT_PAGE, self._settings.max_page_size)
        features = ordered(table, matching(table, request.filter), request.order_by, request.descending)
        end = start + size
        return pb.ListFeaturesResponse(
            cards=cards(table, features[start:end]),
            next_page_token=page_token(request, self._bundle, end) if end < len(features) else "",
            total=len(features),
            dictionary=name,
            timings=timings(),
            bundle=self._bundle,
        )

    async def GetFeature(self, request: pb.GetFeatureRequest, context: Any) -> pb.GetFeatureResponse:  # noqa: N802
        """Return one card with its examples."""
        name, table = self._catalogue.table(request.dictionary, "dictionary")
        response = pb.GetFeatureResponse(
            card=card(table, request.feature), dictionary=name, timings=timings(), bundle=self._bundle
        )
        examples = self._catalogue.cards.get(name)
        if examples is None:
            return response
        max_images = request.max_images if request.HasField("max_images") else _ALL_EXAMPLES
        max_texts = request.max_texts if request.HasField("max_texts") else _ALL_EXAMPLES
        for example in examples.top(request.feature, "image", max_images):
            image = response.images.add(
                caption=example.text, sample=example.sample, activation=example.activation
            )
            if example.thumbnail:
                image.thumbnail.data = example.thumbnail
        for example in examples.top(request.feature, "text", max_texts):
            response.texts.add(text=example.text, sample=example.sample, activation=example.activation)
        return response

    async def ClassifyModality(  # noqa: N802
        self, request: pb.ClassifyModalityRequest, context: Any
    ) -> pb.ClassifyModalityResponse:
        """Say how each input's energy is spread over the labels."""
        if len(request.inputs) > self._settings.max_items:
            message = f"{len(request.inputs)} inputs; {self._settings.max_items} are allowed"
            raise InvalidInput(message, [("inputs", message)])
        name, table = self._catalogue.table(request.dictionary, "dictionary")
        task = EncodeTask(items_of(request.inputs), name, truncate_text=request.truncate_text)
        try:
            check_texts(task.items, self._settings.max_text_bytes, task.truncate_text)
            encoded = await self._encoder.encode(task, context.time_remaining())
        except InvalidInput as error:
            raise relocated(error, lambda i: f"inputs[{i}]") from error
        self._metrics.items.labels(_CLASSIFY).inc(len(task.items))
        top = request.top_features if request.HasField("top_features") else _DEFAULT_TOP_FEATURES
        return pb.ClassifyModalityResponse(
            classifications=[classify(features, table, top) for features in encoded.features],
            dictionary=name,
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )

    async def ScoreModality(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ScoreModalityRequest], context: Any
    ) -> pb.ScoreModalityResponse:
        """Score the caller's pairs.

        Batches are read one at a time, and of each only the active features are kept: at most
        `max_score_pairs` rows whatever the size of the images, in `max_client_streams` streams.
        """
        with self._streams.admitted(request_iterator) as requests:
            return await self._scored(requests, context)

    async def _scored(
        self, requests: AsyncIterator[pb.ScoreModalityRequest], context: Any
    ) -> pb.ScoreModalityResponse:
        asked = pb.ScoreSettings()
        scores: PairScores | None = None
        first = True
        async for message in requests:
            if message.WhichOneof("payload") == "settings":
                if not first:
                    raise InvalidInput(
                        "settings must be the first message",
                        [("settings", "must be the first message, at most once")],
                    )
                validate(message)
                asked = message.settings
                self._catalogue.resolve(asked.dictionary, "settings.dictionary")
            else:
                scores = scores or self._pair_scores(asked)
                await self._add(message, asked, scores, context)
            first = False
        scores = scores or self._pair_scores(asked)
        table = await self._score(scores.request(context.time_remaining()))
        known = self._catalogue.tables.get(scores.dictionary)
        return await asyncio.to_thread(self._answer, table, known, scores)

    def _pair_scores(self, asked: pb.ScoreSettings) -> PairScores:
        name = self._catalogue.resolve(asked.dictionary, "settings.dictionary")
        return PairScores(name, score_settings(asked, name), self._settings.max_score_pairs)

    async def _add(
        self, message: pb.ScoreModalityRequest, asked: pb.ScoreSettings, scores: PairScores, context: Any
    ) -> None:
        place = scores.place_of_next_batch()
        scores.check_room(len(message.batch.pairs))
        try:
            validate(message)
            items = tuple(p.image.data for p in message.batch.pairs)
            texts = tuple(p.text for p in message.batch.pairs)
            task = EncodeTask(
                (*items, *texts),
                scores.dictionary,
                truncate_text=asked.truncate_text,
                stream=scores.stream,
            )
            check_texts(task.items, self._settings.max_text_bytes, task.truncate_text)
            encoded = await self._encoder.encode_patiently(task, context.time_remaining())
        except InvalidInput as error:
            raise place.relocated(error, len(message.batch.pairs)) from error
        self._metrics.items.labels(_SCORE).inc(len(task.items))
        scores.add(encoded, [pair.group for pair in message.batch.pairs])

    def _answer(
        self, table: ModalityTable, known: ModalityTable | None, scores: PairScores
    ) -> pb.ScoreModalityResponse:
        if known is not None:
            table = replace(
                table,
                **{
                    column: getattr(known, column)
                    for column in (
                        "name",
                        "name_npmi",
                        "name_auc",
                        "name_auc_low",
                        "name_auc_high",
                        "name_count",
                        "emb_sim_image",
                        "emb_sim_text",
                        "win_rate_image",
                        "win_rate_text",
                    )
                },
            )
        return pb.ScoreModalityResponse(
            cards=cards(table, range(len(table)), scores.settings.delta),
            pairs=scores.pairs,
            settings=scores.settings,
            timings=timings(scores.queue_s, scores.inference_s),
            bundle=self._bundle,
        )
