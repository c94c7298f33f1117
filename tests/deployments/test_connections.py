"""What bounds connections before any call: how many, how long a handshake, how long without calls, how old."""

from __future__ import annotations

import asyncio
import socket
import time

from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb

from tests.deployments.conftest import Open
from tests.support.http2 import Raw

REQUEST = pb.EncodeRequest(inputs=[common.Input(text="a")])
# Seconds in which a busy machine does what an idle one does at once.
SOON_S = 60.0


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Wait for the server to close; what it says before is thrown away."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            if not connection.recv(1 << 16):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False


def goes_away(raw: Raw) -> bool:
    """Wait for the server to say that it ends a connection."""
    ends = time.monotonic() + SOON_S
    while not raw.gone and time.monotonic() < ends and raw.pump(0.1):
        pass
    return raw.gone


async def test_one_connection_too_many_is_closed_and_the_others_stand(open_gateway: Open) -> None:
    async with open_gateway(max_connections=4) as gateway:
        # The first one.
        assert (await gateway.features.Encode(REQUEST, timeout=SOON_S)).norms

        def crowd() -> tuple[list[Raw], bool]:
            standing = [Raw(gateway.port) for _ in range(3)]
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=SOON_S) as extra:
                extra.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
                return standing, is_closed(extra, SOON_S)

        standing, closed = await asyncio.to_thread(crowd)
        try:
            assert closed
            assert all([await asyncio.to_thread(raw.pump, 0.05) for raw in standing])
            assert (await gateway.features.Encode(REQUEST, timeout=SOON_S)).norms
        finally:
            for raw in standing:
                raw.socket.close()

        def comes_in() -> bool:
            # The server hears of the closed ones a moment later.
            ends = time.monotonic() + SOON_S
            while time.monotonic() < ends:
                with Raw(gateway.port) as raw:
                    if raw.events and raw.pump(0.05):
                        return True
            return False

        assert await asyncio.to_thread(comes_in)


async def test_a_connection_that_does_not_say_who_it_is_is_closed(open_gateway: Open) -> None:
    async with open_gateway(handshake_s=0.2) as gateway:

        def silent() -> bool:
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=SOON_S) as connection:
                return is_closed(connection, SOON_S)

        assert await asyncio.to_thread(silent)
        assert (await gateway.features.Encode(REQUEST, timeout=SOON_S)).norms
    async with open_gateway() as gateway:

        def patient() -> bool:
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=SOON_S) as connection:
                return is_closed(connection, 1.0)

        assert not await asyncio.to_thread(patient)


async def test_a_connection_without_calls_is_ended_and_its_client_connects_again(open_gateway: Open) -> None:
    async with open_gateway(connection_idle_s=0.3) as gateway:

        def idle() -> bool:
            with Raw(gateway.port) as raw:
                return goes_away(raw)

        assert (await gateway.features.Encode(REQUEST, timeout=SOON_S)).norms
        assert await asyncio.to_thread(idle)
        assert (await gateway.features.Encode(REQUEST, timeout=SOON_S)).norms


async def test_an_old_connection_is_ended_but_no_call_in_progress(open_gateway: Open) -> None:
    item = pb.StreamEncodeRequest(item=pb.StreamItem(id="1", input=common.Input(text="a")))
    async with open_gateway(connection_age_s=0.3) as gateway:
        call = gateway.features.StreamEncode(timeout=SOON_S)
        await call.write(item)
        assert (await call.read()).id == "1"

        def old() -> bool:
            with Raw(gateway.port) as raw:
                return goes_away(raw)

        # The stream's own connection is older than this one.
        assert await asyncio.to_thread(old)
        await call.write(item)
        assert (await call.read()).id == "1"
        await call.done_writing()
    async with open_gateway(connection_age_s=0.3, connection_age_grace_s=0.3) as gateway:
        call = gateway.features.StreamEncode(timeout=SOON_S)
        await call.write(item)
        assert (await call.read()).id == "1"
        async with asyncio.timeout(SOON_S):
            while not call.done():
                await asyncio.sleep(0.05)
        assert (await gateway.features.Encode(REQUEST, timeout=SOON_S)).norms
