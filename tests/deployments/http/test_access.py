"""Who may call over HTTP: tokens and scopes, other origins, names that lead here, TLS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.access import files
from deployments.access.scopes import Scope
from deployments.access.tokens import new_token
from deployments.operations.settings import Settings
from tests.deployments.conftest import Gateway, Open
from tests.deployments.http.conftest import ENCODE, Opened, reason_of
from tests.support.certificates import Authority

REQUEST = {"inputs": [{"text": "a"}]}
OTHER = "https://app.example"


@pytest.mark.parametrize(
    ("scopes", "path", "body", "status", "reason"),
    [
        (None, ENCODE, REQUEST, 401, "TOKEN_MISSING"),
        ([], ENCODE, REQUEST, 401, "TOKEN_UNKNOWN"),
        ([Scope.READ], ENCODE, REQUEST, 200, ""),
        ([Scope.GENERATE], ENCODE, REQUEST, 403, "SCOPE_MISSING"),
        (None, "/v1/embeddings", {"input": "a"}, 401, "TOKEN_MISSING"),
        ([Scope.READ], "/v1/embeddings", {"input": "a"}, 200, ""),
        ([Scope.GENERATE], "/v1/embeddings", {"input": "a"}, 403, "SCOPE_MISSING"),
        ([Scope.READ], "/v1/images/generations", {"prompt": "a"}, 403, "SCOPE_MISSING"),
        ([Scope.READ], "/openapi.json", None, 403, "SCOPE_MISSING"),
        (None, "/openapi.json", None, 401, "TOKEN_MISSING"),
        ([Scope.ADMIN], "/openapi.json", None, 200, ""),
        (None, "/v1/models", None, 401, "TOKEN_MISSING"),
        ([Scope.READ], "/v1/models", None, 200, ""),
        (None, "/healthz", None, 200, ""),
        (None, "/readyz", None, 200, ""),
    ],
)
async def test_a_token_is_asked_for_as_over_grpc(
    open_http: Opened, scopes: Any, path: str, body: Any, status: int, reason: str
) -> None:
    known, line = new_token("known", frozenset(scopes or [Scope.READ]), None)
    shown = known if scopes else "mf_unknown"
    headers = {} if scopes is None else {"authorization": f"Bearer {shown}"}
    async with open_http(tokens=line) as (_, client):
        response = await client.request("GET" if body is None else "POST", path, json=body, headers=headers)
        assert response.status_code == status, response.text
        if status == 401:
            assert response.headers["www-authenticate"] == "Bearer"
        if reason:
            error = response.json()
            assert (error["error"]["code"] if "error" in error else reason_of(error)) == reason


async def test_a_call_without_a_token_is_refused_unread(open_http: Opened) -> None:
    _, line = new_token("known", frozenset([Scope.READ]), None)

    async with open_http(tokens=line) as (gateway, _):
        # By hand: the client would send all of the body before it reads.
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.http_port)
        lines = [
            f"POST {ENCODE} HTTP/1.1",
            "host: localhost",
            "content-type: application/json",
            "content-length: 1000000",
        ]
        head = "\r\n".join([*lines, "", ""])
        writer.write(head.encode())
        assert b" 401 " in await reader.readline()
        writer.close()


async def test_the_rate_of_a_token_is_one_for_both_ports(open_http: Opened) -> None:
    token, line = new_token("known", frozenset([Scope.READ]), None)
    headers = {"authorization": f"Bearer {token}"}
    async with open_http(tokens=line, token_rate="2/hour") as (_, client):
        assert (await client.post(ENCODE, json=REQUEST, headers=headers)).status_code == 200
        assert (await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)).status_code == 200
        refused = await client.post(ENCODE, json=REQUEST, headers=headers)
        assert refused.status_code == 429 and reason_of(refused.json()) == "TOKEN_RATE"
        assert int(refused.headers["retry-after"]) > 60


async def test_pages_of_other_origins_may_not_call_unless_it_is_set(open_http: Opened) -> None:
    asking = {
        "origin": OTHER,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    async with open_http() as (_, client):
        asked = await client.options(ENCODE, headers=asking)
        assert "access-control-allow-origin" not in asked.headers
        answered = await client.post(ENCODE, json=REQUEST, headers={"origin": OTHER})
        assert "access-control-allow-origin" not in answered.headers
    async with open_http(http_cors_origins=OTHER) as (_, client):
        asked = await client.options(ENCODE, headers=asking)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == OTHER
        answered = await client.post(ENCODE, json=REQUEST, headers={"origin": OTHER})
        assert answered.headers["access-control-allow-origin"] == OTHER
        assert "x-request-id" in answered.headers["access-control-expose-headers"]
        stranger = await client.options(ENCODE, headers={**asking, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/path", "https://a b"])
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        Settings(http_cors_origins=origin)  # type: ignore[arg-type]


def test_origins_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOFACET_HTTP_CORS_ORIGINS", "https://a.example, http://localhost:5173")
    assert Settings().http_cors_origins == ("https://a.example", "http://localhost:5173")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", ""])
async def test_a_name_that_was_made_to_lead_here_is_not_ours(open_http: Opened, host: str) -> None:
    async with open_http() as (_, client):
        assert (await client.post(ENCODE, json=REQUEST, headers={"host": host})).status_code == 421
        for ours in ("localhost", "LOCALHOST:8080", "[::1]:8080", "127.0.0.1", "10.0.0.7:80"):
            response = await client.post(ENCODE, json=REQUEST, headers={"host": ours})
            assert response.status_code == 200, ours
    _, line = new_token("known", frozenset([Scope.READ]), None)
    async with open_http(tokens=line) as (_, client):
        assert (await client.get("/readyz", headers={"host": host or "x"})).status_code == 200


def files_of(folder: Path, authority: Authority, name: str = "localhost") -> dict[str, Path]:
    certificate, key = authority.issue(name)
    paths = {"tls_certificate": folder / "tls.crt", "tls_key": folder / "tls.key"}
    paths["tls_certificate"].write_bytes(certificate)
    paths["tls_key"].write_bytes(key)
    return paths


async def peer_name(gateway: Gateway, context: ssl.SSLContext) -> str:
    """Return for whom the certificate is that a new connection is shown."""
    _, writer = await asyncio.open_connection(
        "127.0.0.1", gateway.server.http_port, ssl=context, server_hostname="localhost"
    )
    shown: Any = writer.get_extra_info("peercert")
    writer.close()
    return str(dict(pair for (pair,) in shown["subject"])["commonName"])


async def test_the_certificate_is_grpcs_and_is_read_again(
    open_gateway: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOOK_S", 0.0)
    authority = Authority()
    paths = files_of(tmp_path, authority)
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.check_hostname = False
    async with open_gateway(**paths) as gateway:
        base_url = f"https://localhost:{gateway.server.http_port}"
        async with httpx2.AsyncClient(base_url=base_url, verify=context, trust_env=False) as client:
            assert (await client.post(ENCODE, json=REQUEST)).status_code == 200
        assert await peer_name(gateway, context) == "localhost"
        files_of(tmp_path, authority, "renewed")
        assert await peer_name(gateway, context) == "renewed"
        # A pair that does not fit, as in the middle of a rotation: the former one stays.
        paths["tls_key"].write_bytes(authority.issue()[1])
        assert await peer_name(gateway, context) == "renewed"


async def test_a_client_must_show_a_certificate_where_grpc_asks_for_one(
    open_gateway: Open, tmp_path: Path
) -> None:
    authority, clients = Authority(), Authority("clients")
    paths = files_of(tmp_path, authority)
    (tmp_path / "ca.crt").write_bytes(clients.pem)
    (tmp_path / "mine.crt").write_bytes(b"".join(clients.issue("me")))
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.check_hostname = False
    async with open_gateway(**paths, tls_client_ca=tmp_path / "ca.crt") as gateway:
        base_url = f"https://localhost:{gateway.server.http_port}"
        async with httpx2.AsyncClient(base_url=base_url, verify=context, trust_env=False) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get("/healthz")
        context.load_cert_chain(tmp_path / "mine.crt")
        async with httpx2.AsyncClient(base_url=base_url, verify=context, trust_env=False) as client:
            assert (await client.post(ENCODE, json=REQUEST)).status_code == 200
