"""Calls of FeatureService."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

from monofacet import _requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._async.core import AsyncCore
from monofacet._async.transport import iterate, take, uploading
from monofacet._base import Deadline
from monofacet._inputs import Input
from monofacet._streaming import Ledger
from monofacet.v1 import feature_service_pb2, feature_service_pb2_grpc


class FeatureCalls(AsyncCore):
    """Images and texts to embeddings and sparse features."""

    async def encode(
        self,
        inputs: Input | Iterable[Input],
        *,
        dictionary: str | None = None,
        max_features: int | None = None,
        truncate: bool = False,
        embeddings: bool = True,
        timeout: float | None = None,
    ) -> types.EncodeResult:
        """Encode a batch of images and texts.

        A batch past the server's limits (256 inputs, 32 MiB) is split into several calls, one after the
        other; the result is that of the whole batch. If one input is bad the whole batch fails, and the error
        names every bad input of the call that it was in.

        Parameters
        ----------
        inputs
            Strings are texts; path objects, bytes, data URIs, PIL images, arrays and tensors are images: floats in
            [0, 1], bool, uint16 or integers in [0, 255] of shape [height, width], or with 1, 3 or 4 channels last or
            first. One alone is a batch of one; an array with four axes is a batch of images.
        dictionary
            The dictionary whose features are wanted; an empty string is the default one; None for no
            features.
        max_features
            Keep only this many features an input, the largest. Default all active ones.
        truncate
            Cut texts at the tower's context length instead of refusing them.
        embeddings
            False to leave the embeddings out of the answer.
        timeout
            Seconds for each call, all its tries included. Default `Timeout.call`.

        Returns
        -------
        EncodeResult
            In the order of the inputs.

        Raises
        ------
        InputError
            If an input cannot be sent.
        CallError
            If the call fails.
        """
        options = requests.encode_options(dictionary, max_features, truncate, embeddings)
        answers, sizes = await self._in_parts(
            inputs,
            self._stub(feature_service_pb2_grpc.FeatureServiceStub).Encode,
            lambda part: requests.encode(part, options),
            timeout,
        )
        return responses.encode(answers, sizes, embeddings)

    def stream_encode(
        self,
        items: Iterable[Input | tuple[str, Input]] | AsyncIterable[Input | tuple[str, Input]],
        *,
        dictionary: str | None = None,
        max_features: int | None = None,
        truncate: bool = False,
        embeddings: bool = True,
        timeout: float | None = None,
    ) -> AsyncIterator[types.StreamResult]:
        """Encode a corpus, item by item.

        The items are read as the server takes them, so that a corpus need not fit the
        memory. A bad item is its own result and does not end the stream.
        To leave the loop early and end the call at once, use `contextlib.aclosing`.

        Parameters
        ----------
        items
            Inputs as `encode` takes them, or pairs of an id and an input. Ids are positions by default.
            The iterable may be asynchronous.
        dictionary, max_features, truncate, embeddings
            As for `encode`.
        timeout
            Seconds for the whole stream. Default `Timeout.stream`.

        Yields
        ------
        StreamResult
            One an item, in order.

        Raises
        ------
        CallError
            If the stream fails. What was yielded before is good.
        """
        options = requests.encode_options(dictionary, max_features, truncate, embeddings)
        return self._stream(items, options, Deadline(self._timeout.stream if timeout is None else timeout))

    async def _stream(
        self,
        items: Iterable[Input | tuple[str, Input]] | AsyncIterable[Input | tuple[str, Input]],
        options: feature_service_pb2.EncodeOptions,
        deadline: Deadline,
    ) -> AsyncIterator[types.StreamResult]:
        ledger = Ledger()

        async def messages() -> AsyncIterator[feature_service_pb2.StreamEncodeRequest]:
            yield self._addressed(feature_service_pb2.StreamEncodeRequest(options=options))
            async for item in iterate(items):
                message = await take(ledger, item)
                if message is not None:
                    yield message

        def begin(sent: AsyncIterator[feature_service_pb2.StreamEncodeRequest]) -> Any:
            stub = self._stub(feature_service_pb2_grpc.FeatureServiceStub)
            return self._begin(stub.StreamEncode, sent, deadline)

        async with uploading(messages(), begin, self._failed) as call:
            answers = aiter(call)
            while (response := await self._next(answers)) is not None:
                for result in ledger.answer(response):
                    yield result
        for result in ledger.close():
            yield result
