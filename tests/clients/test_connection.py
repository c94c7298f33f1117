"""A client's connection: closed, used by loops and threads, sent to other processes, kept from proxies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import monofacet
import numpy as np
import pytest
from monofacet import TLS, AsyncClient, Client, ClosedError, Retry, Timeout
from monofacet._config import Connection, is_loopback
from monofacet.testing import FakeMonofacet, mock_async_client, mock_client, run_server

# Far above what a busy machine takes; only a call that hangs reaches it.
HANGS = 60.0
PICTURE = np.zeros((8, 8, 3), np.uint8)
CALLS: dict[str, Callable[[Any], Any]] = {
    "encode": lambda client: client.encode("a"),
    "encode_large": lambda client: client.encode(["a"] * 300),
    "stream_encode": lambda client: client.stream_encode(["a"]),
    "features": lambda client: client.features(),
    "features_page": lambda client: client.features_page(),
    "feature": lambda client: client.feature(1),
    "classify_modality": lambda client: client.classify_modality("a"),
    "score_modality": lambda client: client.score_modality([(PICTURE, "a")]),
    "classify_gender": lambda client: client.classify_gender("a"),
    "audit_gender": lambda client: client.audit_gender([monofacet.LabelledItem("a")]),
    "filter_adversarial": lambda client: client.filter_adversarial([PICTURE]),
    "generate": lambda client: client.generate("a"),
    "generate_events": lambda client: client.generate_events("a"),
    "generate_like": lambda client: client.generate_like(MADE),
    "preview_steering": lambda client: client.preview_steering("a", monofacet.SteeringEdit(1, scale=2)),
    "attributes": lambda client: client.attributes(),
    "attribute": lambda client: client.attribute("smile"),
    "model": lambda client: client.model(),
    "models": lambda client: client.models(),
    "health": lambda client: client.health(),
}
MADE = mock_client()[0].generate("a").images[0].data


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with run_server() as target:
        yield target


def finish(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


async def finish_async(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else [item async for item in value]


def test_every_call_is_in_the_table() -> None:
    public = {name for name in dir(Client) if not name.startswith("_")}
    assert set(CALLS) - {"encode_large"} == public - {"target", "bundle", "close", "with_bundle"}


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("name", CALLS)
def test_a_closed_client_says_so(target: str, name: str, used: bool) -> None:
    client = Client(target)
    other = client.with_bundle("fake")
    if used:
        finish(CALLS[name](client))
    client.close()
    client.close()
    for closed in (client, other):
        with pytest.raises(ClosedError, match="the client is closed"):
            finish(CALLS[name](closed))


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_closed_asyncio_client_says_so(target: str, name: str, used: bool) -> None:
    client = AsyncClient(target)
    other = client.with_bundle("fake")
    if used:
        await finish_async(CALLS[name](client))
    await client.close()
    await client.close()
    for closed in (client, other):
        with pytest.raises(ClosedError, match="the client is closed"):
            await finish_async(CALLS[name](closed))


def test_closing_a_client_leaves_the_channel_that_it_was_given(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        with Client(target, channel=channel) as client:
            client.encode("a")
        with pytest.raises(ClosedError):
            client.encode("a")
        late = Client(target, channel=channel)
        late.with_bundle("fake").close()
        assert len(late.encode("a")) == 1
    with pytest.raises(ClosedError):
        late.model()


async def test_an_asyncio_client_whose_channel_was_closed_says_so(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        async with AsyncClient(target, channel=channel) as client:
            await client.encode("a")
        with pytest.raises(ClosedError):
            await client.encode("a")
        late = AsyncClient(target, channel=channel)
        assert len(await late.encode("a")) == 1
    with pytest.raises(ClosedError):
        await late.model()


class Stuck(FakeMonofacet):
    """Answers when it is released; counts the calls that it has."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.release = threading.Event()

    def _wait(self) -> None:
        self.begun.release()
        self.release.wait(HANGS)

    def Encode(self, request: Any, context: Any) -> Any:
        self._wait()
        return super().Encode(request, context)

    def StreamEncode(self, requests: Any, context: Any) -> Any:
        self._wait()
        yield from super().StreamEncode(requests, context)

    def ScoreModality(self, requests: Any, context: Any) -> Any:
        self._wait()
        return super().ScoreModality(requests, context)

    def Generate(self, request: Any, context: Any) -> Any:
        self._wait()
        yield from super().Generate(request, context)


@pytest.fixture()
def stuck() -> Iterator[Stuck]:
    service = Stuck()
    yield service
    service.release.set()


IN_FLIGHT = ("encode", "stream_encode", "score_modality", "generate")


def test_closing_ends_the_calls_of_other_threads(stuck: Stuck) -> None:
    with (
        run_server(stuck) as target,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        client = Client(target, max_in_flight=1)

        def start(*names: str) -> list[Any]:
            return [threads.submit(lambda call: finish(call(client)), CALLS[name]) for name in names]

        running = start(*IN_FLIGHT)
        for _ in IN_FLIGHT:
            assert stuck.begun.acquire(timeout=HANGS)
        # These wait for the one place that `encode` has.
        running += start("models", "encode", "model")
        client.close()
        for call in running:
            assert isinstance(call.exception(HANGS), ClosedError)
        stuck.release.set()


async def test_closing_ends_the_calls_of_other_tasks(stuck: Stuck) -> None:
    with run_server(stuck) as target:
        client = AsyncClient(target, max_in_flight=1)

        def start(*names: str) -> list[Any]:
            return [asyncio.create_task(finish_async(CALLS[name](client))) for name in names]

        running = start(*IN_FLIGHT)
        for _ in IN_FLIGHT:
            assert await asyncio.to_thread(stuck.begun.acquire, timeout=HANGS)
        # These wait for the one place that `encode` has.
        running += start("models", "encode", "model")
        await asyncio.sleep(0)
        await client.close()
        results = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), HANGS)
        assert [type(result) for result in results] == [ClosedError] * len(running)
        stuck.release.set()


async def test_cancelling_a_task_is_no_closing(stuck: Stuck) -> None:
    with run_server(stuck) as target:
        async with AsyncClient(target) as client:
            task = asyncio.create_task(finish_async(client.encode("a")))
            assert await asyncio.to_thread(stuck.begun.acquire, timeout=HANGS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stuck.release.set()
            assert len(await client.encode("a")) == 1


def test_closing_ends_the_wait_for_another_try(both: Any) -> None:
    # Longer than any test may take, and within the deadline of the call.
    patient = both(retry=Retry(wait_initial=3000, wait_max=3000), timeout=3600.0)
    patient.channel.fail(grpc.StatusCode.UNAVAILABLE, times=9)
    if patient.asynchronous:

        async def run() -> None:
            call = asyncio.create_task(patient.client.encode("a"))
            while not patient.channel.calls:
                await asyncio.sleep(0)
            await patient.client.close()
            with pytest.raises(ClosedError):
                await asyncio.wait_for(call, HANGS)

        asyncio.run(run())
        return
    with concurrent.futures.ThreadPoolExecutor() as threads:
        call = threads.submit(patient.encode, "a")
        while not patient.channel.calls:
            os.sched_yield()
        patient.close()
        assert isinstance(call.exception(HANGS), ClosedError)


def test_clients_may_be_closed_and_used_by_many_threads_at_once(target: str) -> None:
    # In a process of its own: this has crashed gRPC.
    code = f"""
import threading, monofacet
kinds = [lambda c: c.encode("a"), lambda c: c.models(), lambda c: list(c.stream_encode(["a"])), lambda c: c.health(),
         lambda c: c.classify_gender("a"), lambda c: c.generate("a"), lambda c: list(c.features())]
wrong = []
def work(client, kind):
    try:
        while True:
            kind(client)
    except monofacet.ClosedError:
        pass
    except BaseException as error:
        wrong.append(repr(error))
for _ in range(20):
    client = monofacet.Client({target!r})
    threads = [threading.Thread(target=work, args=(client, kind)) for kind in kinds]
    for thread in threads:
        thread.start()
    client.close()
    for thread in threads:
        thread.join()
print(wrong)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_an_asyncio_client_serves_one_loop_after_the_other(target: str) -> None:
    client = AsyncClient(target)

    async def use() -> int:
        results = [result async for result in client.stream_encode(["a"])]
        return len(results) + len(await client.encode("a"))

    with warnings.catch_warnings():
        # Such as "coroutine ... was never awaited".
        warnings.simplefilter("error")
        assert [asyncio.run(use()) for _ in range(3)] == [2, 2, 2]
        # Connections of loops that ended are not kept.
        assert len(client._links._by_loop) == 1
        asyncio.run(client.close())
        with pytest.raises(ClosedError):
            asyncio.run(use())


def test_an_asyncio_client_serves_several_loops_at_once_and_is_closed_in_all(stuck: Stuck) -> None:
    with run_server(stuck) as target, concurrent.futures.ThreadPoolExecutor() as threads:
        client = AsyncClient(target)
        running = [threads.submit(lambda: asyncio.run(finish_async(client.encode("a")))) for _ in range(3)]
        for _ in running:
            assert stuck.begun.acquire(timeout=HANGS)
        asyncio.run(client.close())
        for call in running:
            assert isinstance(call.exception(HANGS), ClosedError)
        stuck.release.set()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_can_be_sent_to_another_process_with_all_its_settings(kind: type[Any]) -> None:
    client = kind(
        "localhost:1", token="secret", tls=TLS(ca=b"x", server_name="there"), timeout=Timeout(1, 2),
        retry=Retry(attempts=1), bundle="photos", max_in_flight=3,
    )  # fmt: skip
    copy = pickle.loads(pickle.dumps(client.with_bundle("drawings")))
    assert type(copy) is kind
    assert (copy.target, copy.bundle, copy._max_in_flight) == ("localhost:1", "drawings", 3)
    assert (copy._timeout, copy._retry, copy._connection) == (
        Timeout(1, 2),
        Retry(attempts=1),
        client._connection,
    )
    assert copy._metadata == client._metadata


def encode_elsewhere(client: Client) -> Any:
    with client:
        return client.encode("a").embeddings


def test_worker_processes_answer_by_a_client_that_they_were_sent(target: str) -> None:
    # `spawn`, as on every system that is not Linux, and on Linux from Python 3.14 on.
    with (
        Client(target) as client,
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        there = pool.submit(encode_elsewhere, client).result(5 * HANGS)
        assert np.array_equal(there, client.encode("a").embeddings)


@pytest.mark.parametrize("make", [mock_client, mock_async_client])
def test_a_client_with_a_channel_of_its_own_says_why_it_cannot_be_sent(make: Callable[[], Any]) -> None:
    client, _ = make()
    with pytest.raises(monofacet.InputError, match="make a client there"):
        pickle.dumps(client)


HERE = (
    "localhost:9000", "127.0.0.1:9000", "127.1.2.3:9000", "[::1]:9000", "::1", "localhost", "app.localhost:1",
    "dns:///localhost:9000", "dns:localhost:1", "dns://8.8.8.8/localhost:1", "ipv4:127.0.0.1:9000",
    "ipv4:127.0.0.1:1,127.0.0.1:2", "ipv6:[::1]:9000", "unix:/tmp/socket", "unix:///tmp/socket", "unix-abstract:x",
)  # fmt: skip
ELSEWHERE = (
    "example.org:9000", "dns:///example.org:1", "10.0.0.1:9000", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:1",
    "localhost.example.org:1", "2001:db8::1", "xds:///localhost:1",
)  # fmt: skip


@pytest.mark.parametrize("target", HERE)
def test_a_target_on_this_machine_is_known(target: str) -> None:
    assert is_loopback(target)
    assert ("grpc.enable_http_proxy", 0) in Connection(target).options()


@pytest.mark.parametrize("target", ELSEWHERE)
def test_other_targets_are_left_to_the_proxy_settings(target: str) -> None:
    assert not is_loopback(target)
    assert "grpc.enable_http_proxy" not in dict(Connection(target).options())


PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "all_proxy")


@pytest.mark.parametrize("variable", PROXIES)
def test_no_proxy_is_asked_for_this_machine(
    target: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*PROXIES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    # Nothing listens there.
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with Client(target) as client:
        assert client.health() == "SERVING"

    async def ask() -> str:
        async with AsyncClient(target) as client:
            return await client.health()

    assert asyncio.run(ask()) == "SERVING"


def test_other_hosts_go_by_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with (
        Client("monofacet.invalid:9000") as client,
        pytest.raises(monofacet.UnavailableError, match="127.0.0.1:9"),
    ):
        client.health(timeout=HANGS)


def test_a_proxy_variable_does_not_break_the_command(target: str, tmp_path: Path) -> None:
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, "-c", "from monofacet.cli import main; main()", "health", "--target", target],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=5 * HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
