"""Calls of DefenseService."""

from __future__ import annotations

from collections.abc import Iterable

from monofacet import _defense_requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._async.core import AsyncCore
from monofacet._inputs import Input
from monofacet.v1 import defense_service_pb2_grpc


class DefenseCalls(AsyncCore):
    """Which images are adversarial, and their embeddings without what an attack moved."""

    async def filter_adversarial(
        self,
        images: Input | Iterable[Input],
        *,
        labels: Iterable[str] = (),
        mode: types.FilterMode | str | None = None,
        keep_residual: bool | None = None,
        second_look: bool = False,
        filter_all: bool = False,
        max_features: int = 20,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> types.FilterResult:
        """Judge images, and filter those that are called adversarial; see `Client.filter_adversarial`."""
        texts = requests.label_texts(labels)
        options = requests.filter_options(mode, keep_residual, second_look, filter_all, max_features)
        answers, sizes = await self._in_parts(
            images,
            self._stub(defense_service_pb2_grpc.DefenseServiceStub).FilterAdversarial,
            lambda part: requests.filter_adversarial(part, texts, options, truncate),
            timeout,
            field="images",
            reserved=len(texts),
        )
        return responses.filtered(answers, sizes)
