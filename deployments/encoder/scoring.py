"""Scores of pairs and audits of ablations: seconds of computation for one call, in a thread beside the forwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deployments.batching import BatcherClosed, GreedyBatcher
from deployments.encoder.audit import run_audit, until
from deployments.encoder.tasks import AuditRequest, Features, ScoreRequest
from deployments.operations.process import give_way
from deployments.operations.settings import Settings
from services.bias.audit import Audit
from services.check import Check
from services.dictionaries.base import Dictionary, SparseRow
from services.errors import InvalidInput
from services.modality.scores import stack_rows
from services.modality.table import ModalitySettings, score_pairs
from services.modality.tables import ModalityTable

Scored = ModalityTable | tuple[Audit, ...]


def ascending(row: Features) -> SparseRow:
    """Return the active features of one input by feature id, as sparse matrices want them."""
    order = np.argsort(row.indices)
    return SparseRow(row.indices[order], row.values[order])


def group_numbers(names: Sequence[str]) -> NDArray[np.int64] | None:
    """Return one number a pair, the same for pairs of one group; None when every pair stands alone."""
    if not any(names):
        return None
    numbers: dict[object, int] = {}
    # A pair without a group gets a key that no name can be.
    keys = [name or i for i, name in enumerate(names)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


class Scoring:
    """Computes the scores and audits of one replica, one at a time; callers take turns.

    Parameters
    ----------
    settings
        How many may wait, and the niceness of the thread.
    dictionaries
        By name.
    """

    def __init__(self, settings: Settings, dictionaries: Mapping[str, Dictionary]) -> None:
        self._dictionaries = dictionaries
        self._given_up = False
        # One thread: it bounds the dense activations in memory to those of one call.
        self._thread = ThreadPoolExecutor(
            1, "score", initializer=give_way, initargs=(settings.compute_niceness,)
        )
        self._batcher: GreedyBatcher[Callable[[], Scored], Scored] = GreedyBatcher(
            self._run, max_batch=1, max_queued=settings.max_queued_items
        )

    async def score(self, request: ScoreRequest | AuditRequest) -> Scored | InvalidInput:
        """Score pairs, or audit ablations, in a thread; bootstraps and random sets take seconds.

        Returns
        -------
        The table or the audits, or what is wrong with the pairs or items.

        Raises
        ------
        DeadlineExpired
            When the deadline passes before it is done.
        BatcherClosed
            After `close`.
        """
        gone = threading.Event()
        # From now on, since it may wait for the thread longer than its caller does.
        check = until(request.remaining_s, gone.is_set)
        compute = partial(self._compute, request, check)
        try:
            return (await self._batcher.submit([compute], caller=request.caller)).results[0]
        except InvalidInput as error:
            return error
        finally:
            # Ends what is computed for a caller who has gone; nothing once it is done.
            gone.set()

    async def _run(self, computes: list[Callable[[], Scored]]) -> list[Scored]:
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._thread, compute) for compute in computes]

    def _compute(self, request: ScoreRequest | AuditRequest, check: Check) -> Scored:
        check()
        if self._given_up:
            raise BatcherClosed
        if isinstance(request, AuditRequest):
            return run_audit(request, self._dictionaries[request.dictionary], check)
        return self._score(request, check)

    def _score(self, request: ScoreRequest, check: Check) -> ModalityTable:
        n_features = self._dictionaries[request.dictionary].n_features
        images, texts = (
            stack_rows([ascending(row) for row in rows], n_features)
            for rows in (request.images, request.texts)
        )
        settings = ModalitySettings(
            delta=request.delta,
            resamples=request.bootstrap_samples,
            shuffles=request.shuffles,
            fdr=request.false_discovery_rate,
            seed=request.seed,
        )
        return score_pairs(images, texts, settings, group_numbers(request.groups), check)

    def give_up(self) -> None:
        """Compute nothing more that has not begun: it fails with BatcherClosed."""
        self._given_up = True

    async def close(self) -> None:
        """Take no more, and wait for what is computed."""
        await self._batcher.close()
        await asyncio.to_thread(self._thread.shutdown)
