# Generated from ../_async/modality.py by tools/sync_side.py: edit that one, and run `make protos`.
"""Calls of ModalityService."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Unpack

from monofacet import _requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._convert import read
from monofacet._inputs import Input, Pair
from monofacet._score_requests import PairBatcher, score_settings
from monofacet._sync.core import SyncCore
from monofacet.v1 import modality_service_pb2_grpc


class ModalityCalls(SyncCore):
    """Which features are about images, which about texts, and which about both."""

    def features(
        self, *, limit: int | None = None, timeout: float | None = None, **query: Unpack[types.FeatureQuery]
    ) -> Iterator[types.FeatureCard]:
        """Iterate over the features of a dictionary; pages are fetched as they are needed.

        Parameters
        ----------
        limit
            At most so many features. Default all.
        timeout
            Seconds for each page.
        **query
            Which features, and in which order: see `FeatureQuery`. Default all, by feature id.

        Yields
        ------
        FeatureCard
            In order.
        """
        token, left = "", requests.limit(limit)
        while left > 0:
            size = int(min(left, requests.DEFAULT_PAGE_SIZE))
            page = self.features_page(page_size=size, page_token=token, timeout=timeout, **query)
            yield from page.cards
            token, left = page.next_page_token, left - len(page.cards)
            if not token:
                return

    def features_page(
        self,
        *,
        page_size: int = requests.DEFAULT_PAGE_SIZE,
        page_token: str = "",
        timeout: float | None = None,
        **query: Unpack[types.FeatureQuery],
    ) -> types.FeaturePage:
        """Get one page of features, with their total. `features` fetches all pages.

        Parameters
        ----------
        page_size
            Features a page, 1 to 1,000.
        page_token
            `FeaturePage.next_page_token` of the page before. Default the first page.
        timeout
            Seconds for the call, all its tries included.
        **query
            As for `features`.

        Returns
        -------
        FeaturePage
            In order.
        """
        request = requests.list_features(query, page_size, page_token)
        stub = self._stub(modality_service_pb2_grpc.ModalityServiceStub)
        return read(types.FeaturePage, self._call(stub.ListFeatures, request, timeout))

    def feature(
        self,
        feature: int,
        *,
        dictionary: str = "",
        max_images: int | None = None,
        max_texts: int | None = None,
        timeout: float | None = None,
    ) -> types.FeatureDetail:
        """Get one feature, with the images and texts that activate it most.

        Parameters
        ----------
        feature
            Feature id.
        dictionary
            Its name; empty for the default one.
        max_images, max_texts
            At most so many, 0 to 100. Default all that the bundle has.
        timeout
            Seconds for the call, all its tries included.

        Returns
        -------
        FeatureDetail
            With PIL images.

        Raises
        ------
        NotFoundError
            If there is no such feature or dictionary.
        """
        request = requests.get_feature(feature, dictionary, max_images, max_texts)
        stub = self._stub(modality_service_pb2_grpc.ModalityServiceStub)
        return read(types.FeatureDetail, self._call(stub.GetFeature, request, timeout))

    def classify_modality(
        self,
        inputs: Input | Iterable[Input],
        *,
        dictionary: str = "",
        top_features: int = 10,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> types.ClassificationResult:
        """Tell how the energy of each input is spread over features about images, texts and both.

        Parameters
        ----------
        inputs
            As for `encode`; split in the same way.
        dictionary
            Its name; empty for the default one.
        top_features
            Features listed an input, 0 to 100.
        truncate
            Cut texts at the tower's context length instead of refusing them.
        timeout
            Seconds for each call, all its tries included.

        Returns
        -------
        ClassificationResult
            In the order of the inputs.
        """
        answers, sizes = self._in_parts(
            inputs,
            self._stub(modality_service_pb2_grpc.ModalityServiceStub).ClassifyModality,
            lambda part: requests.classify_modality(part, dictionary, truncate, top_features),
            timeout,
        )
        return responses.classification(answers, sizes)

    def score_modality(
        self,
        pairs: Iterable[Pair],
        settings: types.ScoreSettings | None = None,
        *,
        timeout: float | None = None,
    ) -> types.ModalityTable:
        """Score the features of a dictionary on image-text pairs of your own.

        Parameters
        ----------
        pairs
            Images as `encode` takes them, with their texts, and optionally a group: pairs of one group, such
            as several pictures of one concept, are not independent. They are read as they are sent.
        settings
            Dictionary, band, intervals and seed. Default the server's.
        timeout
            Seconds for the whole call. Default `Timeout.stream`.

        Returns
        -------
        ModalityTable
            One card a feature, with the settings as used.

        Raises
        ------
        InputError
            If a pair cannot be sent; the call is ended.
        CallError
            If the call fails. It is not tried again.
        """
        table = self._upload(
            self._stub(modality_service_pb2_grpc.ModalityServiceStub).ScoreModality,
            score_settings(settings or types.ScoreSettings()),
            PairBatcher(),
            pairs,
            timeout,
        )
        return read(types.ModalityTable, table)
