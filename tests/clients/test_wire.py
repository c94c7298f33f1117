"""The clients over real channels to a real server: what a mock cannot show."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import monofacet
import numpy as np
import PIL.Image
import pytest
from monofacet import TLS, AsyncClient, Client, Retry
from monofacet.testing import FakeMonofacet, mock_client, run_server


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with run_server() as target:
        yield target


def test_the_wire_gives_what_the_mock_gives(target: str) -> None:
    mock, _ = mock_client()
    with Client(target) as client:
        for call in (
            lambda c: c.encode(["a", "b"], dictionary="").embeddings.tolist(),
            lambda c: [card.feature for card in c.features(order_by="mds")],
            lambda c: c.feature(3).card,
            lambda c: c.classify_modality("a").classifications,
            lambda c: c.models(),
            lambda c: c.health(),
        ):
            assert call(client) == call(mock)


async def test_the_asyncio_client_gives_the_same(target: str) -> None:
    with Client(target) as plain:
        expected = plain.encode(["a", "b"], dictionary="")
    async with AsyncClient(target) as client:
        results = [result async for result in client.stream_encode(["a", "b"], dictionary="")]
        assert np.array_equal(np.stack([result.embedding for result in results]), expected.embeddings)
        batches = await asyncio.gather(*(client.encode([str(n)]) for n in range(20)))
        assert len(batches) == 20
        assert await client.health() == "SERVING"


def test_a_corpus_streams_through_in_order(target: str) -> None:
    with Client(target) as client:
        results = list(client.stream_encode((str(n), f"text {n}") for n in range(500)))
    assert [result.id for result in results] == [str(n) for n in range(500)]


def test_one_client_serves_many_threads(target: str) -> None:
    with Client(target) as client:
        expected = client.encode("a").embeddings
        wrong: list[int] = []

        def work(position: int) -> None:
            if not np.array_equal(client.encode("a").embeddings, expected):
                wrong.append(position)

        threads = [threading.Thread(target=work, args=(position,)) for position in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# Far above what a busy machine takes; only what hangs reaches it.
HANGS = 60.0


class Watched(FakeMonofacet):
    """Answers a call when its caller has left it, and tells whether a stream was answered and left."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.answered = threading.Event()
        self.begun = threading.Event()

    def Encode(self, request: Any, context: Any) -> Any:
        context.add_callback(self.left.set)
        assert self.left.wait(HANGS)
        return super().Encode(request, context)

    def StreamEncode(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        context.add_callback(self.left.set)
        self.begun.set()
        for answer in super().StreamEncode(requests, context):
            self.answered.set()
            yield answer


def test_a_deadline_ends_a_call() -> None:
    with (
        run_server(Watched()) as target,
        Client(target, timeout=0.2) as client,
        pytest.raises(monofacet.DeadlineError),
    ):
        client.encode("a")


async def test_a_deadline_ends_an_asyncio_call() -> None:
    with run_server(Watched()) as target:
        async with AsyncClient(target, timeout=0.2) as client:
            with pytest.raises(monofacet.DeadlineError):
                await client.encode("a")


def endless() -> Iterator[str]:
    while True:
        yield "again"


def test_leaving_a_stream_early_cancels_the_call() -> None:
    service = Watched()
    with run_server(service) as target, Client(target) as client:
        for position, _ in enumerate(client.stream_encode(endless())):
            if position == 3:
                break
        assert service.left.wait(HANGS)


async def test_leaving_an_asyncio_stream_early_cancels_the_call() -> None:
    service = Watched()
    with run_server(service) as target:
        async with AsyncClient(target) as client:
            stream = client.stream_encode(endless())
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            assert await asyncio.to_thread(service.left.wait, HANGS)


async def test_cancelling_the_caller_cancels_its_call() -> None:
    service = Watched()
    with run_server(service) as target:
        async with AsyncClient(target) as client:

            async def consume() -> None:
                async for _ in client.stream_encode(endless()):
                    pass

            task = asyncio.create_task(consume())
            assert await asyncio.to_thread(service.answered.wait, HANGS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(service.left.wait, HANGS)


def test_the_iterables_own_error_ends_the_call_and_reaches_the_caller() -> None:
    service = Watched()

    def broken() -> Iterator[str]:
        yield "a"
        # A call that is cancelled before its servicer has begun is one that the servicer never sees.
        assert service.begun.wait(HANGS)
        raise KeyError("the caller's own")

    with run_server(service) as target, Client(target) as client:
        with pytest.raises(KeyError):
            list(client.stream_encode(broken()))
        assert service.left.wait(HANGS)
        with pytest.raises(monofacet.InputError, match=r"pairs\[0\]"):
            client.score_modality([(b"", "nothing")])


async def test_the_iterables_own_error_reaches_an_asyncio_caller(target: str) -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise KeyError("the caller's own")

    async with AsyncClient(target) as client:
        with pytest.raises(KeyError):
            [result async for result in client.stream_encode(broken())]
        with pytest.raises(monofacet.InputError, match=r"pairs\[0\]"):
            await client.score_modality([(b"", "nothing")])


class Refusing(FakeMonofacet):
    """Ends every stream before it has read any of it."""

    def StreamEncode(self, request_iterator: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

    def ScoreModality(self, request_iterator: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")


async def test_why_a_stream_was_refused_is_told_however_much_is_still_being_sent() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    pictures = [PIL.Image.fromarray(noise)] * 64
    found: Counter[str] = Counter()
    with run_server(Refusing()) as target:
        async with AsyncClient(target) as client:
            for _ in range(25):
                with pytest.raises(monofacet.CallError) as streamed:
                    [result async for result in client.stream_encode(pictures)]
                with pytest.raises(monofacet.CallError) as uploaded:
                    await client.score_modality((picture, "noise") for picture in pictures)
                found.update([str(streamed.value), str(uploaded.value)])
    assert found == {"UNAUTHENTICATED: who are you?": 50}


def test_nothing_that_listens_is_unavailable() -> None:
    with Client("localhost:1", retry=Retry(attempts=1)) as client:
        with pytest.raises(monofacet.UnavailableError):
            client.encode("a")
        with pytest.raises(monofacet.UnavailableError):
            list(client.stream_encode(["a"]))
        with pytest.raises(monofacet.UnavailableError):
            client.health()


def test_another_service_is_unsupported() -> None:
    from grpc_health.v1 import health_pb2_grpc

    class HealthOnly(FakeMonofacet):
        def add_to_server(self, server: Any) -> None:
            health_pb2_grpc.add_HealthServicer_to_server(self, server)

    with (
        run_server(HealthOnly()) as target,
        Client(target) as client,
        pytest.raises(monofacet.UnsupportedError),
    ):
        client.encode(["a"] * 300)


def certificates() -> tuple[bytes, bytes]:
    """A self-signed certificate for localhost, made here so that none can expire in the repository."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def test_tls_and_mutual_tls_connect_and_plain_text_does_not() -> None:
    certificate, key = certificates()
    once = Retry(attempts=1)
    credentials = grpc.ssl_server_credentials([(key, certificate)], certificate, require_client_auth=True)
    with run_server(credentials=credentials) as target:
        with Client(target, tls=TLS(ca=certificate, certificate=certificate, key=key), token="t") as client:
            assert len(client.encode("a")) == 1
        for tls in (TLS(ca=certificate), True, False):
            client = Client(target, tls=tls, retry=once, timeout=HANGS)
            with client, pytest.raises(monofacet.UnavailableError):
                client.encode("a")
