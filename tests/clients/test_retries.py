"""What either client tries again, how long it waits, and the deadline of every call."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import monofacet
import pytest
from monofacet import AsyncClient, Client
from monofacet._base import Deadline, Tries
from monofacet.testing import FakeMonofacet, run_server
from monofacet.testing._status import abort

from tests.clients.conftest import FAST, Call, contract_methods


def test_a_bad_input_is_not_tried_again(both: Call) -> None:
    client = both()
    with pytest.raises(monofacet.InvalidInputError):
        client.encode(b"not an image")
    assert len(client.channel.calls) == 1


def test_unavailable_is_tried_again(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, times=2)
    assert len(client.encode("a")) == 1
    assert len(client.channel.calls) == 3


def test_the_last_error_is_raised_when_the_tries_are_used_up(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, "down", times=5)
    with pytest.raises(monofacet.UnavailableError, match="down"):
        client.encode("a")
    assert len(client.channel.calls) == FAST.attempts


def test_resource_exhausted_is_tried_again_only_if_the_server_says_when(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.001)
    assert len(client.encode("a")) == 1
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")
    with pytest.raises(monofacet.OverloadedError, match="QUEUE_FULL"):
        client.encode("a")
    assert len(client.channel.calls) == 3


def test_a_server_that_says_it_will_be_back_is_waited_for(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.001, times=3 * FAST.attempts)
    assert len(client.encode("a")) == 1
    assert len(client.channel.calls) == 3 * FAST.attempts + 1


def test_a_server_that_sheds_load_is_asked_until_it_answers(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.001, times=3 * FAST.attempts)
    assert len(client.encode("a")) == 1
    assert len(client.channel.calls) == 3 * FAST.attempts + 1


def test_tries_that_the_server_asked_for_do_not_count(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, "starting", retry_after=0.001, times=9)
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, "gone", times=9)
    with pytest.raises(monofacet.UnavailableError, match="gone"):
        client.encode("a")
    assert len(client.channel.calls) == 9 + FAST.attempts


def overloaded(retry_after: float | None) -> monofacet.OverloadedError:
    return monofacet.OverloadedError("full", code="RESOURCE_EXHAUSTED", retry_after=retry_after)


def test_waits_grow_up_to_a_bound_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def highest(low: float, high: float) -> float:
        drawn.append((low, high))
        return high

    monkeypatch.setattr("monofacet._base.random.uniform", highest)
    retry = monofacet.Retry(wait_initial=0.25, wait_jitter=0.5, wait_max=2)
    tries = Tries(retry, Deadline(1000))
    assert [tries.wait(overloaded(1)) for _ in range(6)] == [1.5, 2.0, 3.0, 4.0, 4.0, 4.0]
    assert drawn == [(0, 0.5), (0, 1), (0, 2), (0, 2), (0, 2), (0, 2)]
    # What the server asks for is the least, however long.
    assert tries.wait(overloaded(30)) == 32


def test_the_last_wait_leaves_time_for_a_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monofacet._base.random.uniform", lambda low, high: high)
    retry = monofacet.Retry(wait_jitter=10_000, wait_max=10_000)
    assert 100 <= Tries(retry, Deadline(1000)).wait(overloaded(100)) <= 500
    assert Tries(retry, Deadline(1000)).wait(overloaded(800)) == 800
    assert Tries(retry, Deadline(1000)).wait(overloaded(1100)) is None


def test_tries_are_logged_for_those_who_ask_and_nothing_is_written(
    both: Call, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for level in (logging.INFO, logging.DEBUG):
        caplog.clear()
        with caplog.at_level(level, "monofacet"):
            client = both()
            client.channel.fail(grpc.StatusCode.UNAVAILABLE, "down", times=2)
            client.encode("a")
        assert [record.name for record in caplog.records] == ["monofacet"] * (2 * (level == logging.DEBUG))
    assert "down" in caplog.text
    assert capfd.readouterr() == ("", "")


class Few(FakeMonofacet):
    """Works on two inputs at a time, slowly, lets four calls wait, and sheds the others, as a server does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = self.shed = self.most = 0
        self.work = threading.BoundedSemaphore(2)

    def Encode(self, request: Any, context: Any) -> Any:
        with self.lock:
            self.calls += 1
            self.most = max(self.most, self.calls)
            full = self.calls > 6
            self.shed += full
        try:
            if full:
                abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after=0.01)
            with self.work:
                time.sleep(0.002)
                return super().Encode(request, context)
        finally:
            with self.lock:
                self.calls -= 1


async def test_a_thousand_calls_at_once_are_all_answered_by_a_slow_server(
    capfd: pytest.CaptureFixture[str],
) -> None:
    service = Few()
    with run_server(service, threads=32) as target:
        async with AsyncClient(
            target, timeout=600, retry=monofacet.Retry(wait_initial=0.01, wait_jitter=0.01)
        ) as client:
            results = await asyncio.gather(*(client.encode(str(n)) for n in range(1000)))
            assert [len(result) for result in results] == [1] * 1000
    # It was too much for the server, and no more than the client's bound.
    assert service.shed > 0
    assert service.most <= 64
    assert capfd.readouterr() == ("", "")


def test_a_hundred_threads_are_all_answered_by_a_slow_server() -> None:
    service = Few()
    retry = monofacet.Retry(wait_initial=0.01, wait_jitter=0.01)
    with (
        run_server(service, threads=32) as target,
        Client(target, timeout=600, retry=retry, max_in_flight=16) as client,
        concurrent.futures.ThreadPoolExecutor(100) as threads,
    ):
        assert sum(map(len, threads.map(client.encode, map(str, range(300))))) == 300
    assert service.shed > 0
    assert service.most <= 16


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_finds_no_place_in_time_says_so(asynchronous: bool) -> None:
    release = threading.Event()
    begun = threading.Event()

    class Held(FakeMonofacet):
        def Encode(self, request: Any, context: Any) -> Any:
            begun.set()
            release.wait(60)
            return super().Encode(request, context)

    async def wait(target: str) -> None:
        async with AsyncClient(target, max_in_flight=1) as client:
            holder = asyncio.create_task(client.encode("a"))
            await asyncio.to_thread(begun.wait, 60)
            with pytest.raises(monofacet.DeadlineError, match="max_in_flight"):
                await client.models(timeout=0.01)
            release.set()
            assert len(await holder) == 1

    with run_server(Held()) as target:
        if asynchronous:
            asyncio.run(wait(target))
            return
        with Client(target, max_in_flight=1) as client, concurrent.futures.ThreadPoolExecutor() as threads:
            holder = threads.submit(client.encode, "a")
            assert begun.wait(60)
            with pytest.raises(monofacet.DeadlineError, match="max_in_flight"):
                client.models(timeout=0.01)
            release.set()
            assert len(holder.result(60)) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_has_at_least_one_place(kind: type[Any]) -> None:
    with pytest.raises(monofacet.InputError, match="at least 1, not 0"):
        kind(max_in_flight=0)


def test_no_try_comes_earlier_than_the_server_asked(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.2, times=2)
    began = time.monotonic()
    client.encode("a")
    assert time.monotonic() - began >= 0.4


def test_one_attempt_means_one_try_whatever_the_server_says(both: Call) -> None:
    client = both(retry=monofacet.Retry(attempts=1))
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.001)
    with pytest.raises(monofacet.UnavailableError):
        client.encode("a")
    assert len(client.channel.calls) == 1


def test_a_wait_past_the_deadline_is_not_begun(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=100)
    with pytest.raises(monofacet.OverloadedError) as caught:
        client.encode("a", timeout=2)
    assert caught.value.retry_after == 100


@pytest.mark.parametrize("code", ["INTERNAL", "DEADLINE_EXCEEDED", "NOT_FOUND", "UNKNOWN", "CANCELLED"])
def test_other_errors_are_not_tried_again(both: Call, code: str) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode[code], retry_after=0.001)
    with pytest.raises(monofacet.CallError):
        client.encode("a")
    assert len(client.channel.calls) == 1


def test_every_call_has_a_deadline_and_the_token(both: Call, picture: Path) -> None:
    client = both(token="secret")
    client.encode("a")
    client.stream_encode(["a"])
    client.features()
    client.features_page()
    client.feature(1)
    client.classify_modality("a")
    client.score_modality([(picture, "red")])
    client.classify_gender("a nurse")
    client.audit_gender([monofacet.LabelledItem("a nurse", "woman", "nurse")])
    client.filter_adversarial(picture)
    made = client.generate("a heart")
    client.generate_events("a heart")
    client.generate_like(made.images[0].data)
    client.preview_steering("a cat", monofacet.SteeringEdit([1], scale=0.0))
    client.attributes()
    client.attribute("smile")
    client.models()
    client.model()
    client.health()
    # Every method of the contract, so that one that is added cannot be left out here.
    called = {method for method, _ in client.channel.calls}
    assert called == {*contract_methods(), "/grpc.health.v1.Health/Check"}
    assert len(client.channel.timeouts) == len(client.channel.metadata) >= 17
    assert all(timeout is not None and 0 < timeout <= 3600 for timeout in client.channel.timeouts)
    assert set(client.channel.metadata) == {(("authorization", "Bearer secret"),)}
    assert "secret" not in repr(client.client)


def test_timeouts_of_a_call_replace_those_of_the_client(both: Call) -> None:
    client = both(timeout=7000.0)
    client.encode("a")
    client.encode("a", timeout=3000.0)
    # Less what passed before the call was made.
    assert client.channel.timeouts == pytest.approx([7000, 3000], abs=500)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(both: Call, timeout: float) -> None:
    with pytest.raises(monofacet.InputError):
        both().encode("a", timeout=timeout)
