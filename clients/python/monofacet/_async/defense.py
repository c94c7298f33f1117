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
        """Judge images, and filter the embeddings of those that are called adversarial.

        A verdict is evidence, not proof: an attacker who knows the defense evades it. The server's documentation
        says how often.

        Parameters
        ----------
        images
            Images as `encode` takes them; split in the same way.
        labels
            What they may show, for the zero-shot label: 2 to 255 texts. Default the bundle's own.
        mode, keep_residual
            How suspicious features are filtered. Default the bundle's choice.
        second_look
            Also encode each picture smoothed: the best evidence, at the price of a second forward.
        filter_all
            Filter images whose verdict is CLEAN, too.
        max_features
            Suspicious features listed an image, 0 to 1,000.
        truncate
            Cut long labels instead of refusing them.
        timeout
            Seconds for each call, all its tries included.

        Returns
        -------
        FilterResult
            In the order of the images.
        """
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
