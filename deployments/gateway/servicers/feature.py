"""FeatureService: images and texts to embeddings and sparse features."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from deployments.batching import QueueFull
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.errors import describe, reason_of
from deployments.gateway.interceptors.validation import validate
from deployments.gateway.messages import check_texts, items_of, relocated, sparse, tensor, timings
from deployments.metrics import Metrics
from deployments.settings import Settings
from deployments.work import Encoded, Work
from services.errors import InvalidInput

_ENCODE = "monofacet.v1.FeatureService/Encode"
_STREAM = "monofacet.v1.FeatureService/StreamEncode"
# Seconds before a stream's item asks a full queue again.
_STREAM_RETRY_S = 0.02


class FeatureServicer(feature_service_pb2_grpc.FeatureServiceServicer):
    """Answers FeatureService.

    Parameters
    ----------
    encoder
        Where items are encoded.
    catalogue
        Names of the dictionaries.
    settings, metrics
        Of the server.
    """

    def __init__(
        self, encoder: EncoderClient, catalogue: Catalogue, settings: Settings, metrics: Metrics
    ) -> None:
        self._encoder = encoder
        self._catalogue = catalogue
        self._settings = settings
        self._metrics = metrics
        self._bundle = catalogue.bundle.id

    async def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:  # noqa: N802
        """Encode a batch; nothing runs if one input is bad."""
        if len(request.inputs) > self._settings.max_items:
            message = f"{len(request.inputs)} inputs; {self._settings.max_items} are allowed"
            raise InvalidInput(message, [("inputs", message)])
        options = request.options
        work = self._work(items_of(request.inputs), options, "options")
        try:
            check_texts(work.items, self._settings.max_text_bytes)
            encoded = await self._encoder.encode(work, context.time_remaining())
        except InvalidInput as error:
            raise relocated(error, lambda i: f"inputs[{i}]") from error
        self._metrics.items.labels(_ENCODE).inc(len(work.items))
        return pb.EncodeResponse(
            embeddings=tensor(encoded.unit) if wants_embeddings(options) else None,
            norms=encoded.norm.tolist(),
            features=[sparse(work.dictionary or "", features) for features in encoded.features],
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )

    async def StreamEncode(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.StreamEncodeRequest], context: Any
    ) -> AsyncIterator[pb.StreamEncodeResponse]:
        """Encode item by item, in order; a bad item is its own answer.

        The queue is the window: when it is full nothing more is read, and gRPC's flow control makes the
        caller wait.
        """
        window: asyncio.Queue[asyncio.Task[pb.StreamEncodeResponse] | None] = asyncio.Queue(
            # One more is being answered and one more waits to be put.
            max(1, self._settings.stream_window - 2)
        )
        running: set[asyncio.Task[pb.StreamEncodeResponse]] = set()
        stream = secrets.token_hex(8)
        reader = asyncio.create_task(self._read(request_iterator, context, window, running, stream))
        try:
            while (task := await window.get()) is not None:
                yield await task
            await reader
        finally:
            reader.cancel()
            for task in running:
                task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.StreamEncodeRequest],
        context: Any,
        window: asyncio.Queue[asyncio.Task[pb.StreamEncodeResponse] | None],
        running: set[asyncio.Task[pb.StreamEncodeResponse]],
        stream: str,
    ) -> None:
        """Turn requests into running items until the caller is done; the reader's own error comes last."""
        options = pb.EncodeOptions()
        first = True
        try:
            async for request in requests:
                if request.WhichOneof("payload") == "options":
                    if not first:
                        raise InvalidInput(
                            "options must be the first message",
                            [("options", "must be the first message, at most once")],
                        )
                    validate(request)
                    options = request.options
                    self._work((), options, "options")
                elif request.WhichOneof("payload") is None:
                    validate(request)
                else:
                    task = asyncio.create_task(self._item(request, options, context, stream))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    task.add_done_callback(_retrieve)
                    await window.put(task)
                first = False
        except Exception:
            # Not a `finally`: a cancelled reader would wait here for a window that nobody empties.
            await window.put(None)
            raise
        await window.put(None)

    async def _item(
        self, request: pb.StreamEncodeRequest, options: pb.EncodeOptions, context: Any, stream: str
    ) -> pb.StreamEncodeResponse:
        item = request.item
        try:
            validate(item)
            work = replace(self._work(items_of([item.input]), options, "options"), stream=stream)
            check_texts(work.items, self._settings.max_text_bytes)
            encoded = await self._patiently(work, context)
        except InvalidInput as error:
            _, status = describe(relocated(error, lambda _: "input"), self._settings.retry_after_s)
            self._metrics.rejected.labels(reason_of(status)).inc()
            return pb.StreamEncodeResponse(id=item.id, error=status, bundle=self._bundle)
        self._metrics.items.labels(_STREAM).inc()
        features = encoded.features
        return pb.StreamEncodeResponse(
            id=item.id,
            encoding=pb.Encoding(
                embedding=tensor(encoded.unit[0]) if wants_embeddings(options) else None,
                norm=float(encoded.norm[0]),
                features=sparse(work.dictionary or "", features[0]) if features else None,
            ),
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )

    async def _patiently(self, work: Work, context: Any) -> Encoded:
        # A unary call is refused when the queue is full. A stream is made to wait: that is what its flow
        # control is for, and a corpus must not fail halfway because others are busy.
        while True:
            try:
                return await self._encoder.encode(work, context.time_remaining())
            except QueueFull:
                await asyncio.sleep(_STREAM_RETRY_S)

    def _work(self, items: tuple[bytes | str, ...], options: pb.EncodeOptions, where: str) -> Work:
        dictionary = None
        if options.HasField("dictionary"):
            dictionary = self._catalogue.resolve(options.dictionary, f"{where}.dictionary")
        limit = options.max_features if options.HasField("max_features") else None
        return Work(items, dictionary, limit, options.truncate_text)


def _retrieve(task: asyncio.Task[pb.StreamEncodeResponse]) -> None:
    """Look at a task's error, which asyncio would log when an earlier item has ended the stream."""
    if not task.cancelled():
        task.exception()


def wants_embeddings(options: pb.EncodeOptions) -> bool:
    """Return whether the embeddings are to be sent; they are unless the caller says otherwise."""
    return options.include_embeddings if options.HasField("include_embeddings") else True
