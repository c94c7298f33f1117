"""The encoder: towers and dictionaries behind the greedy batcher.

A message from a gateway holds the tasks of many callers. Images are decoded in threads beside the model;
what survives is queued item by item; each forward takes a batch from the queue, whoever the callers are.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.batching import BatcherClosed, BatchRecord, DeadlineExpired, GreedyBatcher, QueueFull
from deployments.encoder.decoding import Decoded, Decoder, Decoding, EncoderFailed, Failed, Prepared
from deployments.encoder.scoring import Scored, Scoring
from deployments.encoder.tasks import (
    AuditRequest,
    Encoded,
    EncoderInfo,
    EncodeTask,
    Features,
    Reply,
    ScoreRequest,
)
from deployments.operations.process import give_way
from deployments.operations.pulse import Activity
from deployments.operations.settings import Settings
from services.dictionaries.base import Dictionary, Modality, SparseRow
from services.errors import InvalidInput

log = logging.getLogger("monofacet.encoder")


class Model(Decoder, Protocol):
    """What the encoder needs of the towers; tests put a counting debug model here."""

    def encode_images(self, pixels: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return unit embeddings (batch, d) and norms (batch,)."""
        ...

    def encode_texts(self, tokens: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return unit embeddings (batch, d) and norms (batch,)."""
        ...

    def noise(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return how noisy each image of a batch is, shape (batch,)."""
        ...

    def smooth(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return the images of a batch smoothed, for a second look."""
        ...

    def info(self) -> EncoderInfo:
        """Describe the towers and what they run on."""
        ...

    def close(self) -> None:
        """Free what the towers hold."""
        ...


# Items from which on a larger batch gains little on a CPU: 4% from 8 to 32, with the embedded bundle's tower.
_EFFICIENT = 8
# Seconds for which a check of the model's health waits for its turn.
_TRY_S = 12.0


@dataclass(frozen=True, slots=True)
class _Row:
    unit: NDArray[np.float32]
    norm: np.float32
    features: Features | None
    noise: float = 0.0
    smoothed: _Row | None = None


def strongest(row: SparseRow, limit: int | None) -> Features:
    """Return the active features of one input, largest activation first, at most `limit` of them."""
    order = np.argsort(-row.values, kind="stable")[:limit]
    return Features(row.indices[order], row.values[order])


def encoded(rows: Sequence[_Row], queue_s: float, inference_s: float, passes: int) -> Encoded:
    """Return the answer that `rows`, one an item, make up."""
    return Encoded(
        np.stack([row.unit for row in rows]),
        np.array([row.norm for row in rows], np.float32),
        tuple(row.features for row in rows if row.features is not None),
        queue_s,
        inference_s,
        np.array([row.noise for row in rows] if passes else [], np.float32),
        encoded([row.smoothed or row for row in rows], 0.0, 0.0, 0) if passes > 1 else None,
    )


class Encoder:
    """Encodes messages of tasks; one per replica.

    Parameters
    ----------
    settings
        Budgets and threads.
    model
        The towers.
    dictionaries
        By name.
    """

    def __init__(self, settings: Settings, model: Model, dictionaries: Mapping[str, Dictionary]) -> None:
        self._settings = settings
        self._model = model
        self._dictionaries = dictionaries
        self._records: list[BatchRecord] = []
        self._name = secrets.token_hex(8)
        self.activity = Activity()
        self._closed = False
        self._messages = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._item_s = 0.0
        # When the model last worked, as of the last check of its health.
        self._tried = self.activity.worked
        # One thread: two forwards at once would only share the same cores.
        self._forward_thread = ThreadPoolExecutor(
            1, "forward", initializer=give_way, initargs=(settings.compute_niceness,)
        )
        self._scoring = Scoring(settings, dictionaries)
        self._decoding = Decoding(settings, model)
        self._batcher: GreedyBatcher[Prepared, _Row] = GreedyBatcher(
            self._run, max_batch=settings.max_batch_items, max_queued=2 * settings.max_queued_items
        )

    def info(self) -> EncoderInfo:
        """Describe the towers and what they run on."""
        return self._model.info()

    async def encode(self, tasks: Sequence[EncodeTask], remaining_s: Sequence[float | None]) -> Reply:
        """Answer one message.

        Parameters
        ----------
        tasks
            The tasks of one or more callers; each succeeds or fails by itself.
        remaining_s
            Seconds until each task's deadline, None for none. Durations, not times: the clocks of two
            machines differ.
        """
        with self._busy():
            return await self._encode(tasks, remaining_s)

    async def _encode(self, tasks: Sequence[EncodeTask], remaining_s: Sequence[float | None]) -> Reply:
        now = asyncio.get_running_loop().time()
        deadlines = [None if s is None else now + s for s in remaining_s]
        started = time.perf_counter()
        # All of a message is decoded before any of it is queued. Otherwise a model that is faster than the
        # decoders would run every item alone, at several times the cost of a batch.
        prepared = await self._decoding(tasks, deadlines)
        decode_s = time.perf_counter() - started
        answers = await asyncio.gather(
            *(
                self._answer(items, deadline, decode_s, task)
                for items, deadline, task in zip(prepared, deadlines, tasks, strict=True)
            ),
        )
        records, self._records = tuple(self._records), []
        return Reply(tuple(answers), records, self._name)

    async def score(self, request: ScoreRequest | AuditRequest) -> Scored | InvalidInput:
        """Score pairs, or audit ablations; see `Scoring.score`."""
        return await self._scoring.score(request)

    async def check_health(self) -> None:
        """Try the model, unless it has worked since the last time.

        Raises
        ------
        EncoderFailed
            When it is stuck.
        Exception
            Whatever the model raises.
        """
        if stuck := self.activity.stuck:
            raise EncoderFailed(stuck)
        if self.activity.worked > self._tried:
            self._tried = self.activity.worked
            return
        tried = asyncio.get_running_loop().run_in_executor(self._forward_thread, self._try)
        # A forward that runs first may take long, and is seen by its own time.
        done, _ = await asyncio.wait([tried], timeout=_TRY_S)
        if done:
            await tried
        elif stuck := self.activity.stuck:
            raise EncoderFailed(stuck)

    def _try(self) -> None:
        with self.activity.running("forward"):
            self._model.encode_texts(self._model.tokenize("a", True)[None])
        self._tried = self.activity.worked

    async def close(self) -> None:
        """Answer what has come, take no more, and free the towers. Scores that have not begun are given up."""
        self._closed = True
        self._scoring.give_up()
        # A message goes through both queues, one after the other.
        await self._idle.wait()
        await self._decoding.close()
        await self._batcher.close()
        await self._scoring.close()
        await asyncio.to_thread(self._forward_thread.shutdown)
        self._model.close()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Hold `close` back while a message is answered."""
        if self._closed:
            raise BatcherClosed
        self._messages += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._messages -= 1
            if not self._messages:
                self._idle.set()

    async def _answer(
        self, items: Sequence[Decoded], deadline: float | None, decode_s: float, task: EncodeTask
    ) -> Encoded | Exception:
        """Run the items of one task; unless each is for itself, nothing runs if one is bad."""
        bad = {i: item for i, item in enumerate(items) if isinstance(item, InvalidInput)}
        failed = next((item for item in items if isinstance(item, Failed)), None)
        if failed is not None:
            return failed
        if bad and not task.each:
            return InvalidInput.gather(list(bad.values()))
        good = [item for item in items if isinstance(item, Prepared)]
        if not good:
            nothing = np.zeros(0, np.float32)
            return Encoded(nothing.reshape(0, 0), nothing, inference_s=decode_s, failed=bad)
        try:
            outcome = await self._batcher.submit(
                good, deadline=deadline, request=task.stream or None, caller=task.caller
            )
        except (QueueFull, DeadlineExpired, BatcherClosed) as error:
            return error
        except Exception:  # one caller's failure must not fail the others of the message
            log.exception("a batch failed")
            return EncoderFailed("the encoder failed")
        passes = max((item.passes for item in good), default=0)
        answer = encoded(outcome.results, outcome.queue_s, decode_s + outcome.run_s, passes)
        return replace(answer, failed=bad, decode_s=decode_s)

    async def _run(self, items: list[Prepared]) -> list[_Row]:
        return await asyncio.get_running_loop().run_in_executor(self._forward_thread, self._forward, items)

    def _forward(self, items: list[Prepared]) -> list[_Row]:
        with self.activity.running("forward"):
            return self._forward_now(items)

    def _forward_now(self, items: list[Prepared]) -> list[_Row]:
        started = time.perf_counter()
        rows: list[_Row | None] = [None] * len(items)
        for modality in Modality:
            chosen = [i for i, item in enumerate(items) if item.modality is modality]
            if not chosen:
                continue
            batch = np.stack([items[i].array for i in chosen])
            encoded_rows = self._rows([items[i] for i in chosen], batch, modality)
            if modality is Modality.IMAGE:
                encoded_rows = self._look_again([items[i] for i in chosen], batch, encoded_rows)
            for i, row in zip(chosen, encoded_rows, strict=True):
                rows[i] = row
        seconds = time.perf_counter() - started
        self._records.append(BatchRecord(len(items), seconds))
        self._size_batches(len(items), seconds)
        return [row for row in rows if row is not None]

    def _size_batches(self, items: int, seconds: float) -> None:
        """Keep the next batches within `max_batch_s`, by the speed of the last full ones."""
        if items < min(_EFFICIENT, self._settings.max_batch_items):
            return
        newest = seconds / items
        self._item_s = newest if self._item_s == 0 else 0.8 * self._item_s + 0.2 * newest
        fitting = int(self._settings.max_batch_s / self._item_s)
        self._batcher.max_batch = min(self._settings.max_batch_items, max(_EFFICIENT, fitting))

    def _rows(self, items: Sequence[Prepared], batch: NDArray[Any], modality: Modality) -> list[_Row]:
        run = self._model.encode_images if modality is Modality.IMAGE else self._model.encode_texts
        unit, norm = run(batch)
        return list(map(_Row, unit, norm, self._features(items, unit, modality)))

    def _look_again(self, items: Sequence[Prepared], batch: NDArray[Any], rows: list[_Row]) -> list[_Row]:
        """Add the noise, and what the smoothed picture encodes to, of the images that a defense asks for."""
        looked = [i for i, item in enumerate(items) if item.passes]
        if not looked:
            return rows
        rows = list(rows)
        for i, level in zip(looked, self._model.noise(batch[looked]), strict=True):
            rows[i] = replace(rows[i], noise=float(level))
        twice = [i for i in looked if items[i].passes > 1]
        if twice:
            smoothed = self._rows([items[i] for i in twice], self._model.smooth(batch[twice]), Modality.IMAGE)
            for i, row in zip(twice, smoothed, strict=True):
                rows[i] = replace(rows[i], smoothed=row)
        return rows

    def _features(
        self, items: Sequence[Prepared], unit: NDArray[np.float32], modality: Modality
    ) -> list[Features | None]:
        features: list[Features | None] = [None] * len(items)
        for name in {item.dictionary for item in items if item.dictionary is not None}:
            chosen = [i for i, item in enumerate(items) if item.dictionary == name]
            with torch.inference_mode():
                rows = self._dictionaries[name].encode_sparse(torch.from_numpy(unit[chosen]), modality)
            for i, row in zip(chosen, rows, strict=True):
                features[i] = strongest(row, items[i].max_features)
        return features
