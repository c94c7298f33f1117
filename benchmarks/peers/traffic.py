"""The load generator: closed-loop callers in a process of their own, the same for gRPC and HTTP.

Reads one JSON line: `kind` (monofacet, openai or json), `target`, `callers`, `items` of one call, `seconds`; writes
one. Bodies are made before the clock starts and answers are read into arrays, whatever the protocol.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import numpy as np
from grpc import StatusCode, aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from benchmarks.pictures import read_pictures

Call = Callable[[int], Awaitable[np.ndarray[Any, Any]]]
# Different bodies; a call takes the next one.
BODIES = 32
MODEL = "vit-b-32"
# Seconds before a call that was refused is made again.
_AGAIN_S = 0.05


def _groups(files: list[bytes], items: int) -> list[list[bytes]]:
    return [[files[(n * items + i) % len(files)] for i in range(items)] for n in range(BODIES)]


async def monofacet(target: str, groups: list[list[bytes]], stack: AsyncExitStack) -> Call:
    """Return a call of FeatureService.Encode."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    channel = await stack.enter_async_context(aio.insecure_channel(target, options=options))
    encode = feature_service_pb2_grpc.FeatureServiceStub(channel).Encode
    requests = [
        pb.EncodeRequest(inputs=[common.Input(image=common.Image(data=data)) for data in group])
        for group in groups
    ]

    async def call(turn: int) -> np.ndarray[Any, Any]:
        answer = (await _patiently(lambda: encode(requests[turn % BODIES]))).embeddings
        return np.frombuffer(answer.data, "<f4").reshape(tuple(answer.shape))

    return call


async def _patiently(call: Callable[[], Awaitable[Any]]) -> Any:
    """Call again when the server says that it is full; the wait is in the call's latency."""
    while True:
        try:
            return await call()
        except aio.AioRpcError as error:
            if error.code() is not StatusCode.RESOURCE_EXHAUSTED:
                raise
            await asyncio.sleep(_AGAIN_S)


async def openai(target: str, groups: list[list[bytes]], stack: AsyncExitStack) -> Call:
    """Return a call of an `/embeddings` endpoint in OpenAI's form, as infinity has it."""
    session = await stack.enter_async_context(_session())
    bodies = [
        json.dumps(
            {
                "model": MODEL,
                "modality": "image",
                "encoding_format": "base64",
                "input": ["data:image/jpeg;base64," + base64.b64encode(data).decode() for data in group],
            }
        ).encode()
        for group in groups
    ]

    async def call(turn: int) -> np.ndarray[Any, Any]:
        answer = await _post(session, f"http://{target}/embeddings", bodies[turn % BODIES])
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
        return np.stack(rows)

    return call


async def plain(target: str, groups: list[list[bytes]], stack: AsyncExitStack) -> Call:
    """Return a call of our two programs, `litserve_app` and `fastapi_app`."""
    session = await stack.enter_async_context(_session())
    bodies = [
        json.dumps({"images": [base64.b64encode(data).decode() for data in group]}).encode()
        for group in groups
    ]

    async def call(turn: int) -> np.ndarray[Any, Any]:
        answer = await _post(session, f"http://{target}/predict", bodies[turn % BODIES])
        return np.frombuffer(base64.b64decode(answer["embeddings"]), "<f4").reshape(-1, 512)

    return call


KINDS = {"monofacet": monofacet, "openai": openai, "json": plain}


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=600),
        headers={"Content-Type": "application/json"},
    )


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> Any:
    async with session.post(url, data=body) as response:
        response.raise_for_status()
        return json.loads(await response.read())


async def drive(order: dict[str, Any]) -> dict[str, Any]:
    """Run callers as told; return latencies (s), images per second, and the first answer's embeddings."""
    callers, items, seconds = order["callers"], order["items"], order["seconds"]
    latencies: list[float] = []
    finished: list[float] = []
    async with AsyncExitStack() as stack:
        call = await KINDS[order["kind"]](order["target"], _groups(read_pictures(), items), stack)
        first = await call(0)
        made = 1

        async def caller(number: int, until: float, least: int) -> None:
            nonlocal made
            turn = number
            done = 0
            while time.perf_counter() < until or done < least:
                began = time.perf_counter()
                await call(turn)
                ended = time.perf_counter()
                latencies.append(ended - began)
                finished.append(ended)
                turn += callers
                done += 1
                made += 1

        # One round that is not measured: connections, and batches that have found their size.
        now = time.perf_counter()
        await asyncio.gather(*(caller(n, now + min(1.0, seconds / 4), 1) for n in range(callers)))
        latencies.clear()
        finished.clear()
        began = time.perf_counter()
        await asyncio.gather(*(caller(n, began + seconds, 2) for n in range(callers)))
    # Every call that was begun is waited for and counted, with the time that it took.
    return {
        "latencies": latencies,
        "rate": len(finished) * items / (max(finished) - began),
        # Those that were not timed, too: the server's CPU time is of all.
        "images": made * items,
        "first": first.tolist() if order.get("answers") else None,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(json.loads(sys.stdin.readline())))))
