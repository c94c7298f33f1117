"""Calls of ModalityService."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Unpack

from monofacet import _requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._async.core import AsyncCore
from monofacet._inputs import Input, Pair
from monofacet._score_requests import PairBatcher, score_settings
from monofacet.v1 import modality_service_pb2_grpc


class ModalityCalls(AsyncCore):
    """Which features are about images, which about texts, and which about both."""

    async def features(
        self, *, limit: int | None = None, timeout: float | None = None, **query: Unpack[types.FeatureQuery]
    ) -> AsyncIterator[types.FeatureCard]:
        """Iterate over the features of a dictionary; see `Client.features`."""
        token, left = "", requests.limit(limit)
        while left > 0:
            size = int(min(left, requests.DEFAULT_PAGE_SIZE))
            page = await self.features_page(page_size=size, page_token=token, timeout=timeout, **query)
            for card in page.cards:
                yield card
            token, left = page.next_page_token, left - len(page.cards)
            if not token:
                return

    async def features_page(
        self,
        *,
        page_size: int = requests.DEFAULT_PAGE_SIZE,
        page_token: str = "",
        timeout: float | None = None,
        **query: Unpack[types.FeatureQuery],
    ) -> types.FeaturePage:
        """Get one page of features, with their total; see `Client.features_page`."""
        request = requests.list_features(query, page_size, page_token)
        stub = self._stub(modality_service_pb2_grpc.ModalityServiceStub)
        return responses.feature_page(await self._call(stub.ListFeatures, request, timeout))

    async def feature(
        self,
        feature: int,
        *,
        dictionary: str = "",
        max_images: int | None = None,
        max_texts: int | None = None,
        timeout: float | None = None,
    ) -> types.FeatureDetail:
        """Get one feature, with the images and texts that activate it most; see `Client.feature`."""
        request = requests.get_feature(feature, dictionary, max_images, max_texts)
        stub = self._stub(modality_service_pb2_grpc.ModalityServiceStub)
        return responses.feature_detail(await self._call(stub.GetFeature, request, timeout))

    async def classify_modality(
        self,
        inputs: Input | Iterable[Input],
        *,
        dictionary: str = "",
        top_features: int = 10,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> types.ClassificationResult:
        """Tell how the energy of each input is spread over the labels; see `Client.classify_modality`."""
        answers, sizes = await self._in_parts(
            inputs,
            self._stub(modality_service_pb2_grpc.ModalityServiceStub).ClassifyModality,
            lambda part: requests.classify_modality(part, dictionary, truncate, top_features),
            timeout,
        )
        return responses.classification(answers, sizes)

    async def score_modality(
        self,
        pairs: Iterable[Pair] | AsyncIterable[Pair],
        settings: types.ScoreSettings | None = None,
        *,
        timeout: float | None = None,
    ) -> types.ModalityTable:
        """Score the features on pairs of your own; see `Client.score_modality`.

        The pairs may be asynchronous.
        """
        table = await self._upload(
            self._stub(modality_service_pb2_grpc.ModalityServiceStub).ScoreModality,
            score_settings(settings or types.ScoreSettings()),
            PairBatcher(),
            pairs,
            timeout,
        )
        return responses.modality_table(table)
