"""The load generator: closed-loop callers in a process of their own. Prints one JSON line.

`python -m benchmarks.load TARGET CALLERS ITEMS SECONDS`
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from benchmarks.pictures import read_pictures


async def callers(target: str, count: int, items: int, seconds: float) -> dict[str, object]:
    """Call in a closed loop; return the latencies (s) of calls that began in time, and the items per second."""
    files = read_pictures()
    inputs = [common.Input(image=common.Image(data=data)) for data in files]
    latencies: list[float] = []
    finished: list[float] = []

    async with aio.insecure_channel(target) as channel:
        encode = feature_service_pb2_grpc.FeatureServiceStub(channel).Encode

        async def caller(number: int, until: float) -> None:
            turn = number
            while time.perf_counter() < until:
                chosen = [inputs[(turn + i) % len(inputs)] for i in range(items)]
                turn += items
                began = time.perf_counter()
                await encode(pb.EncodeRequest(inputs=chosen))
                ended = time.perf_counter()
                latencies.append(ended - began)
                finished.append(ended)

        # One round that is not measured: connections, and batches that have found their size.
        await asyncio.gather(*(caller(n, time.perf_counter() + min(1.0, seconds / 4)) for n in range(count)))
        latencies.clear()
        finished.clear()
        began = time.perf_counter()
        await asyncio.gather(*(caller(n, began + seconds) for n in range(count)))
    # Every call that was begun is waited for and counted, with the time that it took.
    return {"latencies": latencies, "rate": len(finished) * items / (max(finished) - began)}


if __name__ == "__main__":
    result = asyncio.run(callers(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    print(json.dumps(result))
