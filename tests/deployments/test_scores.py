"""When the encoder's one score thread stops: at the caller's deadline, and once the caller has gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.batching import DeadlineExpired
from deployments.encoder.encoder import Encoder
from deployments.encoder.tasks import ScoreRequest
from deployments.operations.settings import Settings
from tests.deployments.debug import DebugDictionary, DebugModel


@pytest.fixture
def encoder() -> Iterator[Encoder]:
    dictionaries: Any = {"debug": DebugDictionary()}
    made = Encoder(Settings(threads=1), DebugModel(), dictionaries)
    yield made
    made._scoring._thread.shutdown()


async def test_a_deadline_counts_from_the_requests_arrival(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Any] = []
    monkeypatch.setattr("deployments.encoder.scoring.score_pairs", lambda *_: computed.append(1))
    busy = threading.Event()
    encoder._scoring._thread.submit(busy.wait)
    scoring = asyncio.ensure_future(encoder.score(ScoreRequest("debug", (), (), (), remaining_s=0.05)))
    await asyncio.sleep(0.1)
    busy.set()
    with pytest.raises(DeadlineExpired):
        await scoring
    assert not computed


async def test_what_is_computed_for_a_caller_who_has_gone_ends(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def endless(*arguments: Any) -> None:
        begun.set()
        try:
            while True:
                arguments[-1]()
        finally:
            ended.set()

    monkeypatch.setattr("deployments.encoder.scoring.score_pairs", endless)
    scoring = asyncio.ensure_future(encoder.score(ScoreRequest("debug", (), (), ())))
    assert await asyncio.to_thread(begun.wait, 10)
    scoring.cancel()
    assert await asyncio.to_thread(ended.wait, 10)


async def test_one_callers_scores_wait_for_one_of_another_and_not_for_all(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(encoder._scoring, "_score", lambda request, _: order.append(request.caller))
    busy = threading.Event()
    encoder._scoring._thread.submit(busy.wait)

    def score(caller: str) -> asyncio.Future[Any]:
        return asyncio.ensure_future(encoder.score(ScoreRequest("debug", (), (), (), caller=caller)))

    scoring = [score("alice") for _ in range(4)]
    await asyncio.sleep(0)
    scoring.append(score("bob"))
    await asyncio.sleep(0.01)
    busy.set()
    await asyncio.gather(*scoring)
    # Alice's first one had begun.
    assert order == ["alice", "bob", "alice", "alice", "alice"]
