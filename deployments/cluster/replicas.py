"""The replicas that compute: each loads its model from a verified bundle, and says how it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from deployments.batching import BatcherClosed, QueueFull
from deployments.encoder.tasks import (
    EncoderFault,
    EncoderInfo,
    EncodeTask,
    ReplicaFaulty,
    Reply,
    ScoreRequest,
)
from deployments.gateway.errors import EncoderUnavailable
from deployments.generator.events import Events, Failed, GenerateTask, GeneratorInfo
from deployments.operations import logs
from deployments.operations.process import (
    computing_thread,
    confine_to_loopback,
    end_with_ray,
    give_back_memory,
    keep_libraries_quiet,
)
from deployments.operations.pulse import take_pulse
from deployments.operations.served import load_served
from deployments.operations.settings import Settings
from services.errors import InvalidInput
from services.modality.tables import ModalityTable

log = logging.getLogger("monofacet")

# How much nicer loading the generator is than computing: what is asked for now comes before what is asked for later,
# but a busy encoder must not keep it from ever being loaded.
_LATER = 5


class EncoderReplica:
    """A replica of the encoder; ready once it is warm.

    A replica that cannot be warmed says why, fails its health checks, and so is replaced by one that may find what it
    lacked: a bundle that is back, memory that is free. The first check is part of the start. On one machine a fault
    passes it, so that the command can ask for the reason; on a cluster it ends the deployment, whose status then says
    why: KubeRay takes a new cluster for good once its deployments have started, and deletes the old one.

    Parameters
    ----------
    settings
        Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        confine_to_loopback(settings)
        end_with_ray(settings)
        keep_libraries_quiet()
        logs.configure(settings.log_format, settings.log_level, "encoder")
        self._encoder: Any = None
        self._checked = not settings.loopback_only
        self._fault = EncoderFault("")
        try:
            self._encoder = _warm_encoder(settings)
        except Exception as error:
            log.exception("the encoder cannot be started")
            self._fault = EncoderFault(f"{type(error).__name__}: {error}".splitlines()[0])

    async def encode(self, tasks: list[EncodeTask], remaining_s: list[float | None]) -> Reply:
        """See `deployments.encoder.encoder.Encoder.encode`; raises ReplicaFaulty without one."""
        if self._encoder is None:
            raise ReplicaFaulty
        reply: Reply = await self._encoder.encode(tasks, remaining_s)
        return reply

    async def score(self, request: ScoreRequest) -> ModalityTable | InvalidInput:
        """See `deployments.encoder.encoder.Encoder.score`; raises ReplicaFaulty without one."""
        if self._encoder is None:
            raise ReplicaFaulty
        answer: ModalityTable | InvalidInput = await self._encoder.score(request)
        return answer

    def info(self) -> EncoderInfo | EncoderFault:
        """See `deployments.encoder.encoder.Encoder.info`; or why there is no encoder."""
        if self._encoder is None:
            return self._fault
        info: EncoderInfo = self._encoder.info()
        return info

    async def check_health(self) -> None:
        """Raise unless the model works; Serve replaces a replica that raises three times in a row."""
        if self._encoder is not None:
            await self._encoder.check_health()
        elif self._checked:
            raise ReplicaFaulty(self._fault.why)
        self._checked = True

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return the fields of a `Pulse`: the gateway asks by the one name that Serve leaves to replicas."""
        activity = None if self._encoder is None else self._encoder.activity
        return asdict(take_pulse(activity, self._fault.why))

    async def __del__(self) -> None:
        """Finish what is queued; Serve awaits this when it stops the replica."""
        if getattr(self, "_encoder", None) is not None:
            await self._encoder.close()


def _warm_encoder(settings: Settings) -> Any:
    # Imported in the replica: the process that only builds the application needs no torch.
    with ThreadPoolExecutor(1) as beside:
        # Hashing leaves the interpreter to the imports, which take longer.
        verified = beside.submit(load_served, settings)
        from deployments.encoder.encoder import Encoder
        from deployments.encoder.model import TowerModel, load_dictionaries

    def warm() -> Encoder:
        bundle = verified.result()
        log.info("loading")
        model = TowerModel(bundle, settings)
        log.info("loaded")
        model.warm_up(settings.max_batch_items)
        dictionaries = load_dictionaries(bundle)
        give_back_memory()
        log.info("warm")
        return Encoder(settings, model, dictionaries)

    with computing_thread(settings.compute_niceness) as thread:
        return thread.submit(warm).result()


class GeneratorReplica:
    """A replica of the generator. It loads its pipeline in a thread, so that the rest need not wait for it.

    Parameters
    ----------
    settings
        Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        confine_to_loopback(settings)
        end_with_ray(settings)
        logs.configure(settings.log_format, settings.log_level, "generator")
        self._settings = settings
        self._checked = False
        self._loading = computing_thread(settings.compute_niceness).submit(self._load)

    def _load(self) -> tuple[Any, GeneratorInfo] | EncoderFault:
        try:
            # In a thread that gives way to the encoder's, without which nothing is served.
            with computing_thread(min(19, self._settings.compute_niceness + _LATER)) as thread:
                model = thread.submit(_warm_pipeline, self._settings).result()
            from deployments.generator.generator import Generator

            return Generator(self._settings, model), model.info()
        except Exception as error:
            log.exception("the generator cannot be started")
            return EncoderFault(f"{type(error).__name__}: {error}".splitlines()[0])

    async def generate(self, task: GenerateTask, remaining_s: float | None) -> AsyncIterator[Events]:
        """See `deployments.generator.generator.Generator.generate`; what it raises comes as a last event."""
        began = time.monotonic()
        loaded = await asyncio.wrap_future(self._loading)
        if isinstance(loaded, EncoderFault):
            yield Events((Failed(EncoderUnavailable("the generator is not available; try later")),))
            return
        left = None if remaining_s is None else remaining_s - (time.monotonic() - began)
        try:
            async with aclosing(loaded[0].generate(task, left)) as messages:
                async for message in messages:
                    yield message
        except (QueueFull, BatcherClosed) as error:
            yield Events((Failed(error),))

    async def check_health(self) -> None:
        """As `EncoderReplica.check_health`; a generator that is being loaded is healthy."""
        if not self._loading.done():
            return
        loaded = self._loading.result()
        if not isinstance(loaded, EncoderFault):
            loaded[0].check_health()
        elif self._checked:
            raise ReplicaFaulty(loaded.why)
        self._checked = True

    async def record_routing_stats(self) -> dict[str, Any]:
        """As `EncoderReplica.record_routing_stats`."""
        if not self._loading.done():
            return asdict(take_pulse(ready=False))
        loaded = self._loading.result()
        if isinstance(loaded, EncoderFault):
            return asdict(take_pulse(None, loaded.why))
        return asdict(take_pulse(loaded[0].activity))

    async def info(self) -> GeneratorInfo | EncoderFault:
        """Describe what it runs on, once it is warm; or say why it is not."""
        loaded = await asyncio.wrap_future(self._loading)
        return loaded if isinstance(loaded, EncoderFault) else loaded[1]

    async def __del__(self) -> None:
        """Finish what is there; Serve awaits this when it stops the replica."""
        if hasattr(self, "_loading") and self._loading.done():
            loaded = self._loading.result()
            if not isinstance(loaded, EncoderFault):
                await loaded[0].close()


def _warm_pipeline(settings: Settings) -> Any:
    # Imported here: nobody but this replica pays for diffusers.
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(load_served, settings)
        from deployments.generator.generator import PipelineModel
        from services.encoding.import_trimming import import_pipelines, no_compiler

        with no_compiler():
            import_pipelines()
            log.info("loading")
            model = PipelineModel(verified.result(), settings)
    give_back_memory()
    log.info("warm")
    return model
