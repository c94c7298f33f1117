"""The gateway's handles of what computes for one bundle: its encoder and its generator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from deployments.batching import DeadlineExpired
from deployments.cluster.handles import ModelHandle
from deployments.encoder.tasks import EncoderFault, EncoderInfo, Reply, ScoreRequest, Work
from deployments.gateway.bundles import Backend
from deployments.gateway.errors import EncoderUnavailable
from deployments.gateway.server import GatewayServer
from deployments.generator.events import Events, GenerateWork, GeneratorInfo
from deployments.operations.served import Served
from services.errors import InvalidInput
from services.modality.tables import ModalityTable

log = logging.getLogger("monofacet")

# Seconds after which a replica that could not be warmed is asked again.
AGAIN_S = 5.0


class BundleModels:
    """The gateway's handles of what computes for one bundle.

    Parameters
    ----------
    server
        Told when replicas are lost and when they are back.
    bundle
        Which one.
    encoder, generator
        Serve's handles; the second is None where no images are generated.
    """

    def __init__(self, server: GatewayServer, bundle: Served, encoder: Any, generator: Any) -> None:
        self._server = server
        self.bundle = bundle

        def handle(deployment: str, of: Any, changed: Callable[[bool, str], Awaitable[None]]) -> ModelHandle:
            lost = server.metrics.replica_restarts.labels(deployment).inc
            made = ModelHandle(deployment, of, lost, lambda alive: changed(alive, bundle.name))
            # Read at each scrape, so that it grows while nothing else moves.
            server.metrics.stalled.labels(deployment).set_function(lambda: made.stalled_s)
            return made

        self._encoder = handle(bundle.encoder, encoder, server.set_serving)
        self._generator = None
        if generator is not None:
            self._generator = handle(bundle.generator, generator, server.set_generating)

    async def encoder_info(self) -> EncoderInfo | EncoderFault:
        """Wait for the encoder to be warm, or to say why it cannot be."""
        info: EncoderInfo | EncoderFault = await self._info(self._encoder)
        return info

    async def _info(self, handle: ModelHandle) -> Any:
        try:
            return await handle.call("info")
        except (EncoderUnavailable, DeadlineExpired) as error:
            return EncoderFault(str(error) or type(error).__name__)

    @property
    def handles(self) -> dict[str, ModelHandle]:
        """What calls the replicas, by deployment."""
        handles = {self.bundle.encoder: self._encoder}
        if self._generator is not None:
            handles[self.bundle.generator] = self._generator
        return handles

    def backend(self, info: EncoderInfo) -> Backend:
        """Return how to call them."""
        generate = None if self._generator is None else self._generate
        return Backend(self._encode, self._score, info, generate)

    async def generate_when_warm(self) -> None:
        """Say that images are made once the generator, if there is one, is warm."""
        if self._generator is None:
            return
        info: GeneratorInfo | EncoderFault = await self._info(self._generator)
        while isinstance(info, EncoderFault):
            # Serve replaces such a replica, whose next one may find what this one lacked.
            log.error("not generating: %s: %s", self.bundle.generator, info.why)
            await asyncio.sleep(AGAIN_S)
            info = await self._info(self._generator)
        await self._server.generate(info, self.bundle.name)
        log.info("generating")

    async def _encode(self, works: list[Work], remaining_s: list[float | None]) -> Reply:
        # Of the work that may wait longest; each of the others ends with its own call.
        known = [s for s in remaining_s if s is not None]
        longest = max(known) if len(known) == len(remaining_s) else None
        reply: Reply = await self._encoder.call("encode", works, remaining_s, remaining_s=longest)
        return reply

    async def _generate(
        self, method: str, work: GenerateWork, remaining_s: float | None
    ) -> AsyncIterator[Events]:
        if self._generator is None:
            raise EncoderUnavailable("no images are made here")
        async with aclosing(
            self._generator.stream(method, work, remaining_s, remaining_s=remaining_s)  # type: ignore[type-var]
        ) as messages:
            async for message in messages:
                yield message

    async def _score(self, request: ScoreRequest) -> ModalityTable:
        answer: ModalityTable | InvalidInput = await self._encoder.call(
            "score", request, remaining_s=request.remaining_s
        )
        if isinstance(answer, InvalidInput):
            raise answer
        return answer
