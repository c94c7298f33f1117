"""The gateway's side of the encoder: what waits at the same time is sent in one message.

A message to another process costs 2-3 ms of CPU whatever it holds. While one is on its way, small requests
gather here and become the next one. Large requests travel alone, so they cannot hold back small ones. This
queue is where most waiting happens, so it is where abandoned and expired tasks are dropped for free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from deployments.batching import DeadlineExpired, GreedyBatcher, QueueFull
from deployments.encoder.tasks import Encoded, EncodeTask, Reply, TravelsAlone
from deployments.gateway.admission.backlog import Backlog
from deployments.gateway.errors import EncoderUnavailable
from deployments.gateway.interceptors.chain import current_caller
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings

Send = Callable[[list[EncodeTask], list[float | None]], Awaitable[Reply]]
DEPLOYMENT = "encoder"
# Seconds after which a replica that has not answered is taken to be gone, or idle beside others that suffice.
_FORGET_S = 10.0
# Seconds after which a part of a stream that found the queue full asks again.
_STREAM_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class _Waiting:
    task: EncodeTask
    deadline: float | None


class EncoderClient:
    """Sends tasks to the encoder and observes what it reports.

    Parameters
    ----------
    send
        Carries one message to an encoder; cancelling it abandons the message.
    settings
        Budgets.
    metrics
        Where batches and queueing are observed.
    backend
        Label of the inference metric.
    traced
        Called with the seconds waited and the seconds computed of every answer.
    alive
        Whether any encoder is left; while none is, what cannot wait is told so.
    deployment
        Label of the metrics.
    """

    def __init__(
        self,
        send: Send,
        settings: Settings,
        metrics: Metrics,
        backend: str,
        traced: Callable[[float, float], None] = lambda _, __: None,
        alive: Callable[[], bool] = lambda: True,
        deployment: str = DEPLOYMENT,
    ) -> None:
        self._deployment = deployment
        self._alive = alive
        self._traced = traced
        self._send = send
        self._settings = settings
        self._metrics = metrics
        self._backend = backend
        self._backlog = Backlog(
            settings.max_queued_items,
            settings.max_queue_s,
            settings.overload_queue_s,
            settings.max_batch_items,
        )
        metrics.limited(
            "max_queued_items", settings.max_queued_items, lambda: self._backlog.items, deployment
        )
        self._heard: dict[str, float] = {}
        # Texts travel apart from pictures: a message is answered as a whole, and decoding takes time.
        self._gathered_texts, self._gathered_pictures = (self._gathering(), self._gathering())

    def _gathering(self) -> GreedyBatcher[_Waiting, Encoded | Exception]:
        return GreedyBatcher(
            self._send_all,
            max_batch=self._settings.coalesce_items,
            # The backlog bounds what waits.
            max_queued=2 * self._settings.max_queued_items,
            concurrency=self._settings.messages_in_flight,
            weigh=lambda waiting: len(waiting.task.items),
            cancel_abandoned=True,
        )

    def shut(self, caller: str) -> bool:
        """Return whether a caller's requests are refused before their size is known.

        Only under overload, when reading what will be refused takes the time of the others. A burst is let in to be
        read: a large request may wait for longer than a single item. While no encoder is left, calls wait for one.
        """
        return self._alive() and self._backlog.overloaded and self._backlog.full(caller)

    @property
    def replicas(self) -> int:
        """Replicas that answered of late, at least 1 while any is left; 0 while none is."""
        began = asyncio.get_running_loop().time() - _FORGET_S
        return max(1, len(self._heard_since(began))) if self._alive() else 0

    def refuse(self) -> None:
        """Count a call that was refused at the door because all encoders are overloaded."""
        self._backlog.refuse()

    async def encode(self, task: EncodeTask, remaining_s: float | None = None) -> Encoded:
        """Encode the items of one caller.

        Parameters
        ----------
        task
            At least one item.
        remaining_s
            Seconds until the caller's deadline; None for none.

        Raises
        ------
        InvalidInput
            With field paths that start at the item: `[2].image.data`.
        QueueFull
            At once, when the request would wait too long.
        EncoderUnavailable
            As QueueFull, while no encoder is left.
        DeadlineExpired
            As the batcher's.
        """
        items = len(task.items)
        task = replace(task, caller=current_caller.get())
        try:
            with self._backlog.admitted(items, task.stream or None, task.caller):
                self._metrics.queue_items.labels(self._deployment).set(self._backlog.items)
                return await self._encode(task, remaining_s)
        except QueueFull:
            if not self._alive():
                raise EncoderUnavailable("the model is not available; try later") from None
            raise
        finally:
            self._metrics.queue_items.labels(self._deployment).set(self._backlog.items)

    async def encode_patiently(self, task: EncodeTask, remaining_s: float | None = None) -> Encoded:
        """Encode a part of a stream, which waits where a unary call is refused.

        Waiting is what a stream's flow control is for, and a corpus must not fail halfway because others are busy.

        Parameters
        ----------
        task, remaining_s
            As for `encode`.

        Raises
        ------
        InvalidInput, EncoderUnavailable, DeadlineExpired
            As `encode`.
        """
        loop = asyncio.get_running_loop()
        deadline = None if remaining_s is None else loop.time() + remaining_s
        while True:
            try:
                return await self.encode(task, None if deadline is None else deadline - loop.time())
            except QueueFull:
                await asyncio.sleep(_STREAM_RETRY_S)

    async def _encode(self, task: EncodeTask, remaining_s: float | None) -> Encoded:
        loop = asyncio.get_running_loop()
        deadline = None if remaining_s is None else loop.time() + remaining_s
        waiting = _Waiting(task, deadline)
        if len(task.items) >= self._settings.direct_items:
            answer, waited = (await self._send_all([waiting]))[0], 0.0
        else:
            only_texts = all(isinstance(item, str) for item in task.items)
            gathered = self._gathered_texts if only_texts else self._gathered_pictures
            outcome = await gathered.submit(
                [waiting], deadline=deadline, request=task.stream or None, caller=task.caller
            )
            answer, waited = outcome.results[0], outcome.queue_s
            if isinstance(answer, TravelsAlone):
                answer = (await self._send_all([waiting]))[0]
        if isinstance(answer, Exception):
            raise answer
        queue_s = waited + answer.queue_s
        self._metrics.queue_duration.labels(self._deployment).observe(queue_s)
        self._metrics.decode_duration.labels(self._deployment).observe(answer.decode_s)
        self._traced(queue_s, answer.inference_s)
        return replace(answer, queue_s=queue_s)

    def _hear(self, replica: str) -> None:
        """Keep every replica busy: as many messages on their way as there are replicas that answer."""
        now = asyncio.get_running_loop().time()
        self._heard[replica] = now
        self._heard = self._heard_since(now - _FORGET_S)
        for gathered in (self._gathered_texts, self._gathered_pictures):
            gathered.concurrency = self._settings.messages_in_flight * len(self._heard)
        self._backlog.replicas = len(self._heard)

    def _heard_since(self, began: float) -> dict[str, float]:
        return {name: at for name, at in self._heard.items() if at >= began}

    async def _send_all(self, message: list[_Waiting]) -> list[Encoded | Exception]:
        now = asyncio.get_running_loop().time()
        remaining = [None if w.deadline is None else w.deadline - now for w in message]
        if all(s is not None and s <= 0 for s in remaining):
            raise DeadlineExpired
        reply = await self._send([w.task for w in message], remaining)
        self._hear(reply.replica)
        for record in reply.records:
            self._metrics.batch_size.labels(self._deployment).observe(record.items)
            self._metrics.inference_duration.labels(self._deployment, self._backend).observe(record.seconds)
        return list(reply.answers)
