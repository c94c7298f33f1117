"""Calls of FeatureService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable

import grpc

from monofacet import _requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._async.core import AsyncCore, Ending, Upload, iterate
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
        """Encode a batch of images and texts; see `Client.encode`."""
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
        """Encode a corpus, item by item; see `Client.stream_encode`. The items may be asynchronous.

        To leave the loop early and end the call at once, use `contextlib.aclosing`.
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
                # Files are read and pictures encoded in a thread; a hop for each text would cost more than the text.
                _, value = requests.stream_item(0, item)
                cheap = isinstance(value, str | bytes)
                message = ledger.take(item) if cheap else await asyncio.to_thread(ledger.take, item)
                if message is not None:
                    yield message

        upload = Upload(messages())
        stub = self._stub(feature_service_pb2_grpc.FeatureServiceStub)
        call = self._begin(stub.StreamEncode, aiter(upload), deadline)
        ending = Ending(call)
        try:
            answers = aiter(call)
            while (response := await self._next(answers)) is not None:
                for result in ledger.answer(response):
                    yield result
            upload.check()
            for result in ledger.close():
                yield result
        except grpc.RpcError as error:
            upload.check()
            raise self._failed(await ending.settle(error)) from error
        except asyncio.CancelledError:
            upload.check()
            raise
        finally:
            call.cancel()
