"""TLS and mutual TLS: who gets in, who does not, and that new certificates need no restart."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet import TLS, Client, Retry, UnavailableError
from monofacet.v1 import model_service_pb2 as pb
from monofacet.v1 import model_service_pb2_grpc
from pydantic import ValidationError

from deployments.access import files
from deployments.access.check import AccessInvalid, open_certificate
from deployments.access.tls import CertificateInvalid, ServerCertificate
from deployments.operations.settings import Settings
from tests.deployments.conftest import Open
from tests.support.certificates import Authority
from tests.support.waiting import PATIENCE_S

OPTIONS = [("grpc.enable_retries", 0)]


class Files:
    """A server's certificate files in a directory."""

    def __init__(self, directory: Path, authority: Authority, clients: Authority | None = None) -> None:
        self.certificate, self.key = directory / "tls.crt", directory / "tls.key"
        self.client_ca = directory / "ca.crt" if clients else None
        self.write(authority)
        if self.client_ca is not None and clients is not None:
            self.client_ca.write_bytes(clients.pem)

    def write(self, authority: Authority) -> None:
        certificate, key = authority.issue()
        self.certificate.write_bytes(certificate)
        self.key.write_bytes(key)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "tls_certificate": self.certificate,
            "tls_key": self.key,
            "tls_client_ca": self.client_ca,
        }


async def ask(port: int, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """Return the status of one call over a connection of its own."""
    target = f"localhost:{port}"
    channel = (
        aio.insecure_channel(target, OPTIONS)
        if credentials is None
        else aio.secure_channel(target, credentials, OPTIONS)
    )
    async with channel:
        try:
            await model_service_pb2_grpc.ModelServiceStub(channel).ListModels(
                pb.ListModelsRequest(), timeout=PATIENCE_S
            )
        except aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def trusting(authority: Authority, own: tuple[bytes, bytes] | None = None) -> grpc.ChannelCredentials:
    certificate, key = own or (None, None)
    return grpc.ssl_channel_credentials(authority.pem, key, certificate)


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_S", 0.0)


async def test_only_a_client_that_trusts_the_servers_authority_gets_in(
    open_gateway: Open, tmp_path: Path
) -> None:
    authority, stranger = Authority(), Authority("stranger")
    async with open_gateway(**Files(tmp_path, authority).settings) as gateway:
        assert await ask(gateway.port, trusting(authority)) is grpc.StatusCode.OK
        assert await ask(gateway.port, trusting(stranger)) is grpc.StatusCode.UNAVAILABLE
        assert await ask(gateway.port, None) is grpc.StatusCode.UNAVAILABLE
        expiry = gateway.sample("monofacet_tls_expiry_timestamp_seconds")
    assert expiry > 1_700_000_000


async def test_under_mutual_tls_a_client_needs_a_certificate_of_the_right_authority(
    open_gateway: Open, tmp_path: Path
) -> None:
    authority, clients, stranger = Authority(), Authority("clients"), Authority("stranger")
    async with open_gateway(**Files(tmp_path, authority, clients).settings) as gateway:
        assert await ask(gateway.port, trusting(authority, clients.issue())) is grpc.StatusCode.OK
        assert await ask(gateway.port, trusting(authority)) is grpc.StatusCode.UNAVAILABLE
        assert await ask(gateway.port, trusting(authority, stranger.issue())) is grpc.StatusCode.UNAVAILABLE
        assert await ask(gateway.port, None) is grpc.StatusCode.UNAVAILABLE


async def test_a_new_certificate_is_used_without_a_restart_and_standing_connections_stay(
    open_gateway: Open, tmp_path: Path
) -> None:
    first, second = Authority("first"), Authority("second")
    pair = Files(tmp_path, first)
    async with open_gateway(**pair.settings) as gateway:
        standing = aio.secure_channel(f"localhost:{gateway.port}", trusting(first), OPTIONS)
        stub = model_service_pb2_grpc.ModelServiceStub(standing)
        await stub.ListModels(pb.ListModelsRequest())
        pair.write(second)
        assert await ask(gateway.port, trusting(second)) is grpc.StatusCode.OK
        assert await ask(gateway.port, trusting(first)) is grpc.StatusCode.UNAVAILABLE
        await stub.ListModels(pb.ListModelsRequest())
        await standing.close()


async def test_an_authority_of_clients_can_be_replaced_without_a_restart(
    open_gateway: Open, tmp_path: Path
) -> None:
    authority, old, new = Authority(), Authority("old"), Authority("new")
    pair = Files(tmp_path, authority, old)
    async with open_gateway(**pair.settings) as gateway:
        assert await ask(gateway.port, trusting(authority, old.issue())) is grpc.StatusCode.OK
        assert pair.client_ca is not None
        pair.client_ca.write_bytes(new.pem)
        assert await ask(gateway.port, trusting(authority, new.issue())) is grpc.StatusCode.OK
        assert await ask(gateway.port, trusting(authority, old.issue())) is grpc.StatusCode.UNAVAILABLE


async def test_a_broken_new_certificate_leaves_the_former_one_in_use(
    open_gateway: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority()
    pair = Files(tmp_path, authority)
    async with open_gateway(**pair.settings) as gateway:
        # Half of a rotation: the key is the new one, the certificate still the old one.
        pair.key.write_bytes(authority.issue()[1])
        assert await ask(gateway.port, trusting(authority)) is grpc.StatusCode.OK
        pair.certificate.write_bytes(b"nonsense")
        assert await ask(gateway.port, trusting(authority)) is grpc.StatusCode.OK
    assert caplog.text.count("the former one stays") >= 1


@pytest.mark.parametrize(("begins", "ends", "why"), [(-2, -1, "expired at"), (1, 2, "is not valid before")])
async def test_a_certificate_that_is_not_valid_now_is_never_taken_into_use(
    open_gateway: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, begins: int, ends: int, why: str
) -> None:
    authority = Authority()
    pair = Files(tmp_path, authority)
    async with open_gateway(**pair.settings) as gateway:
        before = gateway.sample("monofacet_tls_expiry_timestamp_seconds")
        certificate, key = authority.issue(begins=begins, ends=ends)
        pair.certificate.write_bytes(certificate)
        pair.key.write_bytes(key)
        assert await ask(gateway.port, trusting(authority)) is grpc.StatusCode.OK
        assert gateway.sample("monofacet_tls_refused_total") == 1
        assert gateway.sample("monofacet_tls_expiry_timestamp_seconds") == before
    assert why in caplog.text
    with pytest.raises(AccessInvalid, match=why):
        open_certificate(Settings(**pair.settings))


def test_a_certificate_that_came_before_its_time_is_taken_once_it_is_valid(tmp_path: Path) -> None:
    authority = Authority()
    pair = Files(tmp_path, authority)
    now, ends = time.time(), []
    certificate = ServerCertificate(pair.certificate, pair.key, observe=ends.append, now=lambda: now)
    for path, content in zip((pair.certificate, pair.key), authority.issue(begins=0.5), strict=True):
        path.write_bytes(content)
    assert certificate._current() is None
    now += 0.6 * 86_400
    assert certificate._current() is not None
    assert certificate._current() is None
    assert len(ends) == 2


async def test_the_client_of_this_project_speaks_mutual_tls(open_gateway: Open, tmp_path: Path) -> None:
    import asyncio

    authority, clients = Authority(), Authority("clients")
    certificate, key = clients.issue()
    once = Retry(attempts=1)
    async with open_gateway(**Files(tmp_path, authority, clients).settings) as gateway:
        target = f"localhost:{gateway.port}"

        def calls() -> None:
            with Client(target, tls=TLS(authority.pem, certificate, key), retry=once) as client:
                assert client.models()
            client = Client(target, tls=TLS(authority.pem), retry=once)
            with client, pytest.raises(UnavailableError):
                client.models()

        await asyncio.to_thread(calls)


async def test_a_plain_health_port_answers_probes_beside_tls_and_nothing_else(
    open_gateway: Open, tmp_path: Path, unused_tcp_port: int
) -> None:
    pair = Files(tmp_path, Authority())
    async with open_gateway(**pair.settings, health_port=unused_tcp_port) as gateway:
        async with aio.insecure_channel(f"127.0.0.1:{unused_tcp_port}") as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await ask(unused_tcp_port, None) is grpc.StatusCode.UNIMPLEMENTED
        assert await ask(gateway.port, None) is grpc.StatusCode.UNAVAILABLE


def test_a_pair_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    authority = Authority()
    pair = Files(tmp_path, authority)
    ServerCertificate(pair.certificate, pair.key)
    pair.key.write_bytes(authority.issue()[1])
    with pytest.raises(CertificateInvalid, match="does not belong"):
        ServerCertificate(pair.certificate, pair.key)
    pair.key.write_bytes(b"nonsense")
    with pytest.raises(CertificateInvalid, match="PEM private key"):
        ServerCertificate(pair.certificate, pair.key)
    pair.key.unlink()
    with pytest.raises(CertificateInvalid, match="No such file"):
        ServerCertificate(pair.certificate, pair.key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_no_plain_text_on_a_network_unless_it_is_asked_for(host: str) -> None:
    with pytest.raises(ValidationError, match="will not listen"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).host == host
    assert Settings(host=host, tls_certificate=Path("a"), tls_key=Path("b")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_plain_text_is_allowed_on_loopback(host: str) -> None:
    assert Settings(host=host).host == host.strip("[]")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"tls_certificate": "a"}, "belong together"),
        ({"tls_key": "a"}, "belong together"),
        ({"tls_client_ca": "a"}, "needs tls_certificate"),
        ({"token_rate": "often"}, "like `600/minute`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Settings(**values)
