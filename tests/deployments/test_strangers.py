"""What strangers can do on the wire, and what others notice of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import grpc
import h2.exceptions
import h2.settings
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import bias_service_pb2, bias_service_pb2_grpc
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb

from deployments.access import files
from deployments.access.scopes import Scope
from deployments.access.tokens import new_token
from deployments.gateway import server, transport
from deployments.gateway.interceptors import reading
from deployments.operations.limits import MIB
from tests.deployments.conftest import Open, error_details
from tests.support.http2 import Raw, message

ENCODE = "/monofacet.v1.FeatureService/Encode"
STREAM = "/monofacet.v1.FeatureService/StreamEncode"
WATCH = "/grpc.health.v1.Health/Watch"
REQUEST = pb.EncodeRequest(inputs=[common.Input(text="a")])
# The most of a message that gRPC takes before anybody asks for it, with HTTP/2's framing.
WINDOW = 80 * 1024
STRANGER = "127.0.0.2"


async def test_of_half_sent_requests_only_those_that_are_being_read_are_held(open_gateway: Open) -> None:
    limits = {"max_request_bytes": 2 * MIB, "max_held_bytes": 16 * MIB, "read_patience_s": 600.0}

    def half_send(port: int) -> tuple[int, list[dict[str, str]]]:
        with Raw(port, STRANGER) as raw:
            # The connection's own window grows with what is read; each stream's own is what bounds it.
            streams = [raw.open(ENCODE) for _ in range(40)]
            sent = [raw.send(stream, message(2 * MIB, bytes(2 * MIB - 1)), seconds=0.2) for stream in streams]
            held.append(gateway.server._requests._held[f"ipv4:{STRANGER}"])
            return sum(sent), [raw.status(stream, 0.0) for stream in streams]

    held: list[int] = []
    async with open_gateway(**limits) as gateway:
        sending = asyncio.ensure_future(asyncio.to_thread(half_send, gateway.port))
        while not sending.done():
            assert (await gateway.features.Encode(REQUEST, timeout=60)).norms
        sent, statuses = await sending
        # Two of 4 MiB, by count, fit into the stranger's half.
        assert held == [2 * 4 * MIB]
        assert sent <= 2 * 2 * MIB + 38 * WINDOW
        assert not any(statuses)


async def test_a_half_sent_request_is_given_up_for_another_and_told_why(open_gateway: Open) -> None:
    async with open_gateway(max_request_bytes=MIB, max_held_bytes=1, read_patience_s=0.1) as gateway:

        def half_send() -> tuple[dict[str, str], dict[str, str]]:
            with Raw(gateway.port, STRANGER) as raw:
                first, second = raw.open(ENCODE), raw.open(ENCODE)
                for stream in (first, second):
                    raw.send(stream, message(1000))
                return raw.status(first), raw.status(second, 0.0)

        told, not_told = await asyncio.to_thread(half_send)
    assert told["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert "did not come within" in told["grpc-message"]
    assert not not_told


async def test_a_call_without_a_deadline_cannot_send_its_request_for_ever(open_gateway: Open) -> None:
    async with open_gateway(read_s=0.1) as gateway:
        call = gateway.channel.stream_stream(ENCODE)()
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_details(caught.value) == ("REQUEST_SLOW", [], 0.25)


async def test_silent_streams_shut_nobody_out(open_gateway: Open) -> None:
    async with open_gateway() as gateway:

        def silent() -> tuple[list[Raw], int]:
            raws = [Raw(gateway.port, STRANGER) for _ in range(8)]
            streams = [(raw, raw.open(STREAM)) for raw in raws for _ in range(64)]
            return raws, sum(raw.status(stream, 0.01) != {} for raw, stream in streams)

        raws, _ = await asyncio.to_thread(silent)
        try:
            items = [pb.StreamEncodeRequest(item=pb.StreamItem(id="1", input=common.Input(text="a")))]
            answers = [answer async for answer in gateway.features.StreamEncode(iter(items), timeout=60)]
            assert [answer.id for answer in answers] == ["1"]
            assert (await gateway.features.Encode(REQUEST, timeout=60)).norms
            assert gateway.server._requests.streams == gateway.settings.max_streams // 2
        finally:
            for raw in raws:
                raw.socket.close()


async def test_a_server_with_silent_streams_stops(
    open_gateway: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_DRAIN_S", 0.1)
    async with open_gateway(drain_s=60.0) as gateway:
        call = gateway.features.StreamEncode()
        await call.write(pb.StreamEncodeRequest(item=pb.StreamItem(id="1", input=common.Input(text="a"))))
        assert (await call.read()).id == "1"
        assert await gateway.server.drain()
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert error_details(caught.value)[0] == "DRAINING"


@pytest.mark.parametrize("change", ["revoked", "scope"])
async def test_a_token_that_is_revoked_ends_its_streams(
    open_gateway: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(files, "LOOK_S", 0.0)
    monkeypatch.setattr(server, "_LOOK_AT_TOKENS_S", 0.05)
    alice, line = new_token("alice", frozenset([Scope.READ]), None)
    bob, other = new_token("bob", frozenset([Scope.READ]), None)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{line}\n{other}\n")
    first = pb.StreamEncodeRequest(item=pb.StreamItem(id="1", input=common.Input(text="a")))
    async with open_gateway(tokens_file=tokens) as gateway:
        calls = [
            gateway.features.StreamEncode(metadata=(("authorization", f"Bearer {token}"),), timeout=60)
            for token in (alice, bob)
        ]
        for call in calls:
            await call.write(first)
            assert (await call.read()).id == "1"
        tokens.write_text(
            f"{other}\n" if change == "revoked" else f"{line.replace('read', 'generate')}\n{other}\n"
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await calls[0].read()
        await calls[1].write(first)
        assert (await calls[1].read()).id == "1"
        await calls[1].done_writing()
    codes = {"revoked": grpc.StatusCode.UNAUTHENTICATED, "scope": grpc.StatusCode.PERMISSION_DENIED}
    reasons = {"revoked": "TOKEN_UNKNOWN", "scope": "SCOPE_MISSING"}
    assert caught.value.code() is codes[change]
    assert error_details(caught.value)[0] == reasons[change]


async def test_a_caller_who_takes_no_answers_is_told_and_not_waited_for(open_gateway: Open) -> None:
    async with open_gateway(untaken_s=0.1) as gateway:
        name = "monofacet_rejected_total"
        with await asyncio.to_thread(Raw, gateway.port, STRANGER, 0) as raw:
            stream = await asyncio.to_thread(raw.open, STREAM)
            item = pb.StreamEncodeRequest(item=pb.StreamItem(id="1", input=common.Input(text="a")))
            data = item.SerializeToString()
            await asyncio.to_thread(raw.send, stream, message(len(data), data))
            while not gateway.sample(name, reason="ANSWER_NOT_TAKEN"):
                await asyncio.sleep(0.01)


async def test_watchers_are_bounded_and_their_names_short(open_gateway: Open) -> None:
    async with open_gateway(max_watchers=4) as gateway:
        stub = health_pb2_grpc.HealthStub(gateway.channel)
        watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for call in watching:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        unknown = {"service": "nobody"}
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest(**unknown)).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watching[1].cancel()
        for size, code in ((257, "INVALID_ARGUMENT"), (5_000, "RESOURCE_EXHAUSTED")):
            for method in (stub.Check, lambda request: stub.Watch(request).read()):
                with pytest.raises(aio.AioRpcError) as caught:
                    await method(health_pb2.HealthCheckRequest(service="x" * size))
                assert caught.value.code().name == code
        while True:
            # Until the server has heard of the cancellation.
            call = stub.Watch(health_pb2.HealthCheckRequest(**unknown))
            try:
                status = (await call.read()).status
            except aio.AioRpcError:
                continue
            break
        assert status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        gateway.server._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await watching[0].read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_watchers_who_take_nothing_keep_no_server_from_saying_that_it_stops(open_gateway: Open) -> None:
    async with open_gateway(linger_s=1.0) as gateway:
        data = health_pb2.HealthCheckRequest().SerializeToString()

        def watch() -> Raw:
            raw = Raw(gateway.port, STRANGER, window=0)
            for _ in range(50):
                raw.send(raw.open(WATCH), message(len(data), data))
            return raw

        with await asyncio.to_thread(watch):
            draining = asyncio.ensure_future(gateway.server.drain())
            await asyncio.sleep(0)
            answer = await health_pb2_grpc.HealthStub(gateway.channel).Check(
                health_pb2.HealthCheckRequest(), timeout=60
            )
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await asyncio.wait_for(draining, 60)


@pytest.mark.parametrize("with_call", [False, True])
async def test_keepalive_pings_end_nothing(
    open_gateway: Open, monkeypatch: pytest.MonkeyPatch, with_call: bool
) -> None:
    # Seconds in place of tens of seconds.
    monkeypatch.setattr(transport, "PING_INTERVAL_MS", 20)
    async with open_gateway() as gateway:

        def pings() -> bool:
            with Raw(gateway.port) as raw:
                if with_call:
                    raw.open(STREAM)
                for _ in range(10):
                    raw.ping()
                    raw.pump(0.05)
                    raw.pump(0.05)
                return not raw.gone and raw.pump()

        assert await asyncio.to_thread(pings)


async def test_pings_without_end_are_still_ended(open_gateway: Open) -> None:
    async with open_gateway() as gateway:

        def pings() -> bool:
            with Raw(gateway.port) as raw:
                for _ in range(100):
                    raw.ping()
                    raw.pump(0.05)
                    if raw.gone:
                        return True
            return False

        assert await asyncio.to_thread(pings)


async def test_after_ten_thousand_resets_the_next_caller_is_answered(open_gateway: Open) -> None:
    async with open_gateway() as gateway:

        def resets() -> int:
            with Raw(gateway.port, STRANGER) as raw:
                code = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
                assert raw.connection.remote_settings[code] == gateway.settings.max_connection_calls
                return raw.reset_many(ENCODE, 10_000)

        resetting = asyncio.ensure_future(asyncio.to_thread(resets))
        while not resetting.done():
            assert (await gateway.features.Encode(REQUEST, timeout=60)).norms
        await resetting
        assert (await gateway.features.Encode(REQUEST, timeout=60)).norms
        assert gateway.server._requests.bytes == 0


async def test_calls_of_one_caller_leave_places_to_others(open_gateway: Open) -> None:
    async with open_gateway(max_concurrent_calls=4) as gateway:
        gateway.model.hold()
        target, options = f"127.0.0.1:{gateway.port}", [("grpc.use_local_subchannel_pool", 1)]
        async with aio.insecure_channel(target, options) as channel:
            stub = bias_service_pb2_grpc.BiasServiceStub(channel)
            mine = [asyncio.ensure_future(gateway.features.Encode(REQUEST)) for _ in range(2)]
            while gateway.server._admission._calls.total() < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.ClassifyGender(bias_service_pb2.ClassifyGenderRequest(inputs=REQUEST.inputs))
            assert error_details(caught.value)[0] == "TOO_MANY_CALLS"

            def other() -> dict[str, str]:
                with Raw(gateway.port, STRANGER) as raw:
                    stream = raw.open("/monofacet.v1.ModelService/ListModels")
                    raw.send(stream, message(0))
                    # Its answer may have come already, and with it the end of the stream.
                    with suppress(h2.exceptions.StreamClosedError):
                        raw.connection.end_stream(stream)
                    raw._flush()
                    return raw.status(stream)

            assert (await asyncio.to_thread(other))["grpc-status"] == "0"
            gateway.model.release()
            await asyncio.gather(*mine)
