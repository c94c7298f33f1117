"""A server whose certificate rotates, for a process of its own: python -m ... CERTIFICATE KEY; prints its port."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deployments.access import files
from deployments.access.tls import ServerCertificate


async def main() -> None:
    files.LOOK_S = 0.0
    certificate = ServerCertificate(Path(sys.argv[1]), Path(sys.argv[2]))
    server = aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    print(server.add_secure_port("localhost:0", certificate.credentials()), flush=True)
    await server.start()
    # Until whoever started it closes its standard input.
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
