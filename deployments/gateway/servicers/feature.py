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


class _Window:
    """The items of a stream that are in progress, in order; bounded in number and in bytes.

    Parameters
    ----------
    max_items
        In progress at once.
    max_bytes
        Of their messages together; an item that is larger by itself is alone.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._queue: asyncio.Queue[tuple[asyncio.Task[pb.StreamEncodeResponse], int] | None] = asyncio.Queue()
        self._items = self._bytes = 0
        self._left = asyncio.Event()

    async def room(self, size: int) -> None:
        """Wait until an item of `size` bytes fits; one reader only."""
        while self._items >= self._max_items or (self._items and self._bytes + size > self._max_bytes):
            self._left.clear()
            await self._left.wait()

    def enter(self, task: asyncio.Task[pb.StreamEncodeResponse], size: int) -> None:
        """Let an item in."""
        self._items += 1
        self._bytes += size
        self._queue.put_nowait((task, size))

    def leave(self, size: int) -> None:
        """Let the oldest item out, once it is answered."""
        self._items -= 1
        self._bytes -= size
        self._left.set()

    def end(self) -> None:
        """Say that no more items come."""
        self._queue.put_nowait(None)

    async def next(self) -> tuple[asyncio.Task[pb.StreamEncodeResponse], int] | None:
        """Return the oldest item, or None after the last."""
        return await self._queue.get()


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

        The window bounds what is in progress: when it is full nothing more is read, and gRPC's flow control
        makes the caller wait.
        """
        window = _Window(self._settings.stream_window, self._settings.max_request_bytes)
        running: set[asyncio.Task[pb.StreamEncodeResponse]] = set()
        stream = secrets.token_hex(8)
        reader = asyncio.create_task(self._read(request_iterator, context, window, running, stream))
        try:
            while (entry := await window.next()) is not None:
                task, size = entry
                yield await task
                window.leave(size)
            await reader
        finally:
            reader.cancel()
            for task in running:
                task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.StreamEncodeRequest],
        context: Any,
        window: _Window,
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
                    size = request.ByteSize()
                    await window.room(size)
                    task = asyncio.create_task(self._item(request, options, context, stream))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    task.add_done_callback(_retrieve)
                    window.enter(task, size)
                first = False
        except Exception:
            window.end()
            raise
        window.end()

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
