"""The gateway's handles of what computes for one bundle: its encoder and its generator."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.gateway.bundles import Backend
from deployments.gateway.errors import EncoderUnavailable
from deployments.gateway.server import GatewayServer
from deployments.generation_work import GeneratorInfo
from deployments.handles import ModelHandle
from deployments.served import Served
from deployments.work import EncoderFault, EncoderInfo, Reply, ScoreRequest, Work
from services.errors import InvalidInput
from services.tables import ModalityTable

log = logging.getLogger("monofacet")


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
            return ModelHandle(deployment, of, lost, lambda alive: changed(alive, bundle.name))

        self._encoder = handle(bundle.encoder, encoder, server.set_serving)
        self._generator = None
        if generator is not None:
            self._generator = handle(bundle.generator, generator, server.set_generating)

    async def encoder_info(self) -> EncoderInfo | EncoderFault:
        """Wait for the encoder to be warm, or to say why it cannot be."""
        info: EncoderInfo | EncoderFault = await self._encoder.call("info")
        return info

    def backend(self, info: EncoderInfo) -> Backend:
        """Return how to call them."""
        generate = None if self._generator is None else self._generator.stream
        return Backend(self._encode, self._score, info, generate)

    async def generate_when_warm(self) -> None:
        """Say that images are made once the generator, if there is one, is warm."""
        if self._generator is None:
            return
        info: GeneratorInfo | EncoderFault = await self._generator.call("info")
        if isinstance(info, EncoderFault):
            log.error("not generating: %s: %s", self.bundle.generator, info.why)
            return
        await self._server.generate(info, self.bundle.name)
        log.info("generating")

    async def _encode(self, works: list[Work], remaining_s: list[float | None]) -> Reply:
        reply: Reply = await self._encoder.call("encode", works, remaining_s)
        return reply

    async def _score(self, request: ScoreRequest) -> ModalityTable:
        answer: ModalityTable | InvalidInput | EncoderUnavailable = await self._encoder.call("score", request)
        if isinstance(answer, InvalidInput | EncoderUnavailable):
            raise answer
        return answer
