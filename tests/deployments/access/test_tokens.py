"""Tokens: how they are kept, compared, rotated and bounded."""

from __future__ import annotations

import asyncio
import os
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb

from deployments.access import files, tokens
from deployments.access.scopes import Scope
from deployments.access.tokens import (
    ExpiredToken,
    TokensInvalid,
    TokenStore,
    UnknownToken,
    new_token,
    parse_tokens,
)
from tests.deployments.conftest import Open, error_details
from tests.support.waiting import PATIENCE_S

READ = frozenset([Scope.READ])
REQUEST = pb.EncodeRequest(inputs=[common.Input(text="a")])


def test_a_token_is_admitted_with_its_name_scopes_and_limits() -> None:
    token, line = new_token("alice", frozenset([Scope.READ, Scope.GENERATE]), None)
    found = TokenStore(None, line + " rate=5/second calls=3").find(token)
    assert (found.name, found.scopes, found.calls) == ("alice", {Scope.READ, Scope.GENERATE}, 3)
    assert str(found.rate) == "5 per 1 second"


def test_a_token_has_256_random_bits() -> None:
    made = {new_token("a", READ, None)[0] for _ in range(100)}
    assert len(made) == 100
    # 32 bytes in base64 without padding, after the prefix.
    assert {len(token) for token in made} == {len(tokens.PREFIX) + 43}


def test_only_the_hash_is_kept() -> None:
    token, line = new_token("alice", READ, None)
    store = TokenStore(None, line)
    found = store.find(token)
    assert token not in line
    assert token.encode() not in pickle.dumps(store.tokens)
    assert token not in repr(store.tokens) + repr(found)


def test_every_hash_is_compared_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_token(f"t{n}", READ, None) for n in range(5)]
    store = TokenStore(None, "\n".join(line for _, line in made))
    compared: list[tuple[bytes, bytes]] = []
    real = tokens.hmac.compare_digest

    def counted(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(tokens.hmac, "compare_digest", counted)
    for presented in (made[0][0], made[4][0], "mf_unknown"):
        compared.clear()
        if presented.endswith("unknown"):
            with pytest.raises(UnknownToken):
                store.find(presented)
        else:
            store.find(presented)
        assert len(compared) == 5
        assert {len(a) for a, _ in compared} == {len(b) for _, b in compared} == {32}


@given(st.text())
def test_nothing_but_the_token_is_admitted(text: str) -> None:
    token, line = new_token("alice", READ, None)
    if text != token:
        with pytest.raises(UnknownToken):
            TokenStore(None, line).find(text)


def test_a_token_ends_at_its_time() -> None:
    moment = datetime.now(UTC)
    token, line = new_token("alice", READ, moment + timedelta(seconds=10))
    now = [moment.timestamp()]
    store = TokenStore(None, line, now=lambda: now[0])
    assert store.find(token)
    now[0] += 11
    with pytest.raises(ExpiredToken):
        store.find(token)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("alice read never", "expected"),
        ("alice read never mf_secretsecret", "64 hexadecimal"),
        ("alice write never sha256:" + "0" * 64, "scopes are"),
        ("alice read tomorrow sha256:" + "0" * 64, "expires is"),
        ("al/ice read never sha256:" + "0" * 64, "a name has"),
        ("alice read never sha256:" + "0" * 64 + " speed=1", "options are"),
        ("alice read never sha256:" + "0" * 64 + " calls=0", "at least 1"),
        ("alice read never sha256:" + "0" * 64 + " rate=fast", "rate limit"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_never_quoted(line: str, what: str) -> None:
    with pytest.raises(TokensInvalid) as caught:
        parse_tokens("# comment\n\n" + line)
    assert "line 3" in str(caught.value)
    assert what in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_token_is_replaced_without_a_gap_by_rewriting_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOOK_S", 0.0)
    path = tmp_path / "tokens"
    old, old_line = new_token("alice", READ, None)
    new, new_line = new_token("alice", READ, None)
    path.write_text(old_line)
    store = TokenStore(path)
    assert store.find(old)
    path.write_text(f"{old_line}\n{new_line}\n")
    assert store.find(old) and store.find(new)
    # As a mounted Kubernetes Secret changes: another file takes the name.
    (tmp_path / "next").write_text(new_line)
    os.replace(tmp_path / "next", path)
    assert store.find(new)
    with pytest.raises(UnknownToken):
        store.find(old)


@pytest.mark.parametrize("broken", ["nonsense", None], ids=["unreadable line", "no file"])
def test_a_broken_file_leaves_the_former_tokens_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "LOOK_S", 0.0)
    path = tmp_path / "tokens"
    token, line = new_token("alice", READ, None)
    path.write_text(line)
    store = TokenStore(path)
    path.unlink()
    if broken is not None:
        path.write_text(broken)
    assert store.find(token)
    assert store.find(token)
    assert caplog.text.count("stay in force") == 1


def test_the_command_prints_a_token_and_the_line_that_admits_it(capfd: pytest.CaptureFixture[str]) -> None:
    from deployments.token_command import token as command

    command("ci", "read,admin", "2100-01-01")
    made, line = capfd.readouterr().out.split("\n")[:2]
    found = TokenStore(None, line).find(made)
    assert (found.name, found.scopes) == ("ci", {Scope.READ, Scope.ADMIN})


async def test_one_token_may_hold_only_so_many_calls(open_gateway: Open) -> None:
    alice, alice_line = new_token("alice", READ, None)
    bob, bob_line = new_token("bob", READ, None)
    async with open_gateway(tokens=f"{alice_line} calls=2\n{bob_line}") as gateway:

        def call(token: str) -> Any:
            return gateway.features.Encode(REQUEST, metadata=(("authorization", f"Bearer {token}"),))

        gateway.model.hold()
        running = [asyncio.ensure_future(call(alice)) for _ in range(2)]
        await asyncio.to_thread(gateway.model.entered.acquire)
        with pytest.raises(aio.AioRpcError) as caught:
            await call(alice)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_details(caught.value) == ("TOKEN_BUSY", [], 0.25)
        other = asyncio.ensure_future(call(bob))
        gateway.model.release()
        await asyncio.gather(*running, other)
        assert (await call(alice)).norms


@pytest.mark.parametrize(
    ("presented", "code", "reason"),
    [
        (None, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING"),
        ("mf_unknown", grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN"),
        ("generate", grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"),
    ],
)
async def test_a_call_without_the_right_token_is_refused_before_its_request_is_read(
    open_gateway: Open,
    presented: str | None,
    code: grpc.StatusCode,
    reason: str,
) -> None:
    alice, line = new_token("alice", frozenset([Scope.GENERATE]), None)
    metadata = [] if presented is None else [("authorization", f"Bearer {presented}")]
    if presented == "generate":
        metadata = [("authorization", f"Bearer {alice}")]
    encode = "monofacet.v1.FeatureService/Encode"
    async with open_gateway(tokens=line) as gateway:
        with pytest.raises(aio.AioRpcError) as read:
            await gateway.features.Encode(REQUEST, metadata=metadata)
        # Its request never comes.
        call = gateway.channel.stream_stream(f"/{encode}")(metadata=metadata, timeout=PATIENCE_S)
        with pytest.raises(aio.AioRpcError) as unread:
            await call.read()
        for caught in (read, unread):
            assert caught.value.code() is code
            assert error_details(caught.value)[0] == reason
        assert read.value.details() == unread.value.details()
        assert gateway.sample("monofacet_rejected_total", reason=reason) == 2
        name = "monofacet_request_duration_seconds_count"
        assert gateway.sample(name, method=encode, code=code.name, bundle="") == 2


async def test_one_token_may_begin_only_so_many_calls_and_is_told_when_the_next_fits(
    open_gateway: Open,
) -> None:
    alice, alice_line = new_token("alice", READ, None)
    bob, bob_line = new_token("bob", READ, None)
    async with open_gateway(
        tokens=f"{alice_line}\n{bob_line} rate=100/second", token_rate="2/hour"
    ) as gateway:

        def call(token: str) -> Any:
            return gateway.features.Encode(REQUEST, metadata=(("authorization", f"Bearer {token}"),))

        for _ in range(2):
            await call(alice)
        with pytest.raises(aio.AioRpcError) as caught:
            await call(alice)
        reason, _, seconds = error_details(caught.value)
        assert (caught.value.code(), reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_RATE")
        # The first of the two calls leaves the window an hour after it began, which was moments ago.
        assert seconds is not None and 3500 < seconds <= 3600
        # Nor is a request read that is refused for it: this one never comes.
        unread = gateway.channel.stream_stream("/monofacet.v1.FeatureService/Encode")(
            metadata=[("authorization", f"Bearer {alice}")], timeout=PATIENCE_S
        )
        with pytest.raises(aio.AioRpcError) as unheard:
            await unread.read()
        assert error_details(unheard.value)[0] == "TOKEN_RATE"
        for _ in range(5):
            await call(bob)
