"""FeatureService: images and texts to embeddings and sparse features."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from deployments.encoder.tasks import Encoded, EncodeTask
from deployments.gateway.admission.item_stream import Chunks, StreamItem, Window
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.errors import describe, reason_of
from deployments.gateway.interceptors.validation import validate
from deployments.gateway.messages import check_texts, items_of, relocated, sparse, tensor, timings
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.errors import InvalidInput

_ENCODE = "monofacet.v1.FeatureService/Encode"
_STREAM = "monofacet.v1.FeatureService/StreamEncode"


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
        task = self._task(items_of(request.inputs), options, "options")
        try:
            check_texts(task.items, self._settings.max_text_bytes, task.truncate_text)
            encoded = await self._encoder.encode(task, context.time_remaining())
        except InvalidInput as error:
            raise relocated(error, lambda i: f"inputs[{i}]") from error
        self._metrics.items.labels(_ENCODE).inc(len(task.items))
        return pb.EncodeResponse(
            embeddings=tensor(encoded.unit) if wants_embeddings(options) else None,
            norms=encoded.norm.tolist(),
            features=[sparse(task.dictionary or "", features) for features in encoded.features],
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
        settings = self._settings
        window = Window(settings.stream_window, settings.max_request_bytes)
        stream, options = secrets.token_hex(8), pb.EncodeOptions()

        async def encode(items: Sequence[StreamItem]) -> list[pb.StreamEncodeResponse]:
            return await self._chunk(items, options, context, stream)

        # Streams may hold half of the queue, so a chunk must be smaller to fit beside others.
        largest = min(settings.coalesce_items, max(1, settings.max_queued_items // 4))
        chunks = Chunks(encode, largest, settings.messages_in_flight)
        reader = asyncio.create_task(self._read(request_iterator, options, window, chunks))
        try:
            async for item, response in chunks.answers():
                yield response
                window.leave(item.size)
            await reader
        finally:
            reader.cancel()
            chunks.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.StreamEncodeRequest],
        options: pb.EncodeOptions,
        window: Window,
        chunks: Chunks[pb.StreamEncodeResponse],
    ) -> None:
        """Turn requests into items until the caller is done; the reader's own error comes last.

        The caller's options, which only the first message may hold, are written into `options`.
        """
        first = True
        try:
            async for request in requests:
                payload = request.WhichOneof("payload")
                if payload == "item":
                    size = request.ByteSize()
                    await window.room(size)
                    window.enter(size)
                    chunks.add(
                        StreamItem(request.item.id, size, self._value(request.item, options.truncate_text))
                    )
                else:
                    if payload == "options" and not first:
                        raise InvalidInput(
                            "options must be the first message",
                            [("options", "must be the first message, at most once")],
                        )
                    validate(request)
                    options.CopyFrom(request.options)
                    self._task((), options, "options")
                first = False
        finally:
            chunks.end()

    def _value(self, item: pb.StreamItem, truncate: bool) -> bytes | str | InvalidInput:
        try:
            validate(item)
            (value,) = items_of([item.input])
            check_texts((value,), self._settings.max_text_bytes, truncate)
        except InvalidInput as error:
            return error
        return value

    async def _chunk(
        self, items: Sequence[StreamItem], options: pb.EncodeOptions, context: Any, stream: str
    ) -> list[pb.StreamEncodeResponse]:
        """Answer some items of a stream."""
        sent = [i for i, item in enumerate(items) if not isinstance(item.value, InvalidInput)]
        bad = {i: item.value for i, item in enumerate(items) if isinstance(item.value, InvalidInput)}
        rows: dict[int, int] = {}
        encoded: Encoded | None = None
        if sent:
            values = tuple(item.value for item in items if not isinstance(item.value, InvalidInput))
            task = replace(self._task(values, options, "options"), each=True, stream=stream)
            encoded = await self._encoder.encode_patiently(task, context.time_remaining())
            bad |= {sent[place]: error for place, error in encoded.failed.items()}
            good = [i for place, i in enumerate(sent) if place not in encoded.failed]
            rows = {i: row for row, i in enumerate(good)}
            self._metrics.items.labels(_STREAM).inc(len(good))
            dictionary = task.dictionary or ""
        return [
            self._bad(item, bad[i])
            if encoded is None or i in bad
            else self._encoding(item, encoded, rows[i], dictionary, options)
            for i, item in enumerate(items)
        ]

    def _bad(self, item: StreamItem, error: InvalidInput) -> pb.StreamEncodeResponse:
        _, status = describe(relocated(error, lambda _: "input"), self._settings.retry_after_s)
        self._metrics.rejected.labels(reason_of(status)).inc()
        return pb.StreamEncodeResponse(id=item.id, error=status, bundle=self._bundle)

    def _encoding(
        self, item: StreamItem, encoded: Encoded, row: int, dictionary: str, options: pb.EncodeOptions
    ) -> pb.StreamEncodeResponse:
        features = encoded.features
        return pb.StreamEncodeResponse(
            id=item.id,
            encoding=pb.Encoding(
                embedding=tensor(encoded.unit[row]) if wants_embeddings(options) else None,
                norm=float(encoded.norm[row]),
                features=sparse(dictionary, features[row]) if features else None,
            ),
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )

    def _task(self, items: tuple[bytes | str, ...], options: pb.EncodeOptions, where: str) -> EncodeTask:
        dictionary = None
        if options.HasField("dictionary"):
            dictionary = self._catalogue.resolve(options.dictionary, f"{where}.dictionary")
        limit = options.max_features if options.HasField("max_features") else None
        return EncodeTask(items, dictionary, limit, options.truncate_text)


def wants_embeddings(options: pb.EncodeOptions) -> bool:
    """Return whether the embeddings are to be sent; they are unless the caller says otherwise."""
    return options.include_embeddings if options.HasField("include_embeddings") else True
