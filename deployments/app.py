"""Builds the Ray Serve application from the settings: a gateway in front of encoders and generators."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from ray import serve

from deployments import logs
from deployments.batching import BatcherClosed, QueueFull
from deployments.gateway.errors import EncoderUnavailable
from deployments.generation_work import Events, Failed, GenerateWork, GeneratorInfo
from deployments.process import (
    computing_thread,
    confine_to_loopback,
    give_back_memory,
    keep_libraries_quiet,
)
from deployments.served import Served, load_served, read_served
from deployments.settings import Settings
from deployments.work import EncoderFault, EncoderInfo, Reply, ScoreRequest, Work
from services.errors import InvalidInput
from services.tables import ModalityTable

log = logging.getLogger("monofacet")

APP_NAME = "monofacet"
# How much nicer loading the generator is than computing: what is asked for now comes before what is asked for later,
# but a busy encoder must not keep it from ever being loaded.
_LATER = 5
# Seconds between two looks for the file that asks a gateway to drain.
_DRAIN_POLL_S = 0.5


class EncoderReplica:
    """A replica of the encoder; ready once it is warm.

    A replica that cannot be warmed stays, and says why: Serve would only start it again and again, and the
    reason would drown.

    Parameters
    ----------
    settings
        Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        confine_to_loopback(settings)
        keep_libraries_quiet()
        logs.configure(settings.log_format, settings.log_level, "encoder")
        self._encoder: Any = None
        self._fault = EncoderFault("")
        try:
            self._encoder = _warm_encoder(settings)
        except Exception as error:
            log.exception("the encoder cannot be started")
            self._fault = EncoderFault(f"{type(error).__name__}: {error}".splitlines()[0])

    async def encode(self, works: list[Work], remaining_s: list[float | None]) -> Reply:
        """See `deployments.encoder.Encoder.encode`."""
        if self._encoder is None:
            unavailable = EncoderUnavailable("the model is not available; try later")
            return Reply(tuple(unavailable for _ in works))
        reply: Reply = await self._encoder.encode(works, remaining_s)
        return reply

    async def score(self, request: ScoreRequest) -> ModalityTable | InvalidInput | EncoderUnavailable:
        """See `deployments.encoder.Encoder.score`."""
        if self._encoder is None:
            return EncoderUnavailable("the model is not available; try later")
        answer: ModalityTable | InvalidInput = await self._encoder.score(request)
        return answer

    def info(self) -> EncoderInfo | EncoderFault:
        """See `deployments.encoder.Encoder.info`; or why there is no encoder."""
        if self._encoder is None:
            return self._fault
        info: EncoderInfo = self._encoder.info()
        return info

    async def __del__(self) -> None:
        """Finish what is queued; Serve awaits this when it stops the replica."""
        if getattr(self, "_encoder", None) is not None:
            await self._encoder.close()


def _warm_encoder(settings: Settings) -> Any:
    # Imported in the replica: the process that only builds the application needs no torch.
    with ThreadPoolExecutor(1) as beside:
        # Hashing leaves the interpreter to the imports, which take longer.
        verified = beside.submit(load_served, settings)
        from deployments.encoder import Encoder
        from deployments.model import TowerModel, load_dictionaries

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
        logs.configure(settings.log_format, settings.log_level, "generator")
        self._settings = settings
        self._loading = computing_thread(settings.compute_niceness).submit(self._load)

    def _load(self) -> tuple[Any, GeneratorInfo] | EncoderFault:
        try:
            # In a thread that gives way to the encoder's, without which nothing is served.
            with computing_thread(min(19, self._settings.compute_niceness + _LATER)) as thread:
                model = thread.submit(_warm_pipeline, self._settings).result()
            from deployments.generator import Generator

            return Generator(self._settings, model), model.info()
        except Exception as error:
            log.exception("the generator cannot be started")
            return EncoderFault(f"{type(error).__name__}: {error}".splitlines()[0])

    async def generate(self, work: GenerateWork, remaining_s: float | None) -> AsyncIterator[Events]:
        """See `deployments.generator.Generator.generate`; what it raises comes as a last event."""
        began = time.monotonic()
        loaded = await asyncio.wrap_future(self._loading)
        if isinstance(loaded, EncoderFault):
            yield Events((Failed(EncoderUnavailable("the generator is not available; try later")),))
            return
        left = None if remaining_s is None else remaining_s - (time.monotonic() - began)
        try:
            async with aclosing(loaded[0].generate(work, left)) as messages:
                async for message in messages:
                    yield message
        except (QueueFull, BatcherClosed) as error:
            yield Events((Failed(error),))

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
        from deployments.generator import PipelineModel
        from services.lean import import_pipelines, no_compiler

        with no_compiler():
            import_pipelines()
            log.info("loading")
            model = PipelineModel(verified.result(), settings)
    give_back_memory()
    log.info("warm")
    return model


class GatewayReplica:
    """The replica that owns the gRPC server. It takes no Serve requests but those of the command.

    Its ports are open from the start; it serves once the encoder answers, which is after its warm-up.

    Parameters
    ----------
    settings
        Of the server.
    served
        The bundles.
    encoders
        Handles of the encoders' deployments, one a bundle.
    generators
        Handles of the generators', one a bundle; None where no images are generated.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, served: Sequence[Served], encoders: Sequence[Any], generators: Sequence[Any]
    ) -> None:
        from deployments.bundle_models import BundleModels
        from deployments.gateway.catalogue import Catalogue
        from deployments.gateway.server import GatewayServer

        confine_to_loopback(settings)
        logs.configure(settings.log_format, settings.log_level, "gateway")
        catalogues = [Catalogue.read(load_served(bundle.settings)) for bundle in served]
        self._server = GatewayServer(settings, *catalogues)
        self._models = [
            BundleModels(self._server, bundle, encoder, generator)
            for bundle, encoder, generator in zip(served, encoders, generators, strict=True)
        ]
        self._generating: list[asyncio.Task[None]] = []
        if settings.drain_file is not None:
            settings.drain_file.unlink(missing_ok=True)
            self._watching = asyncio.create_task(self._drain_once_there(settings.drain_file))
        self._ports = await self._server.open()
        log.info("listening")
        self._warming = asyncio.create_task(self._serve_when_warm())

    async def _serve_when_warm(self) -> str:
        infos = await asyncio.gather(*(models.encoder_info() for models in self._models))
        # Only what was asked for is served: a bundle left out would be missed by its callers alone.
        for models, info in zip(self._models, infos, strict=True):
            if isinstance(info, EncoderFault):
                log.error("not serving: %s: %s", models.bundle.encoder, info.why)
                return f"{models.bundle.encoder}: {info.why}"
        await self._server.serve_all(
            [
                models.backend(info)
                for models, info in zip(self._models, infos, strict=True)
                if not isinstance(info, EncoderFault)
            ]
        )
        log.info("serving")
        self._generating = [asyncio.create_task(models.generate_when_warm()) for models in self._models]
        return ""

    async def _drain_once_there(self, file: Path) -> None:
        # Not `exists`, which raises where a folder on the way cannot be read.
        while not os.path.exists(file):
            await asyncio.sleep(_DRAIN_POLL_S)
        log.info("draining: %s is there", file.name)
        await self._server.drain()

    def ports(self) -> tuple[int, int]:
        """Return the gRPC port and the metrics port."""
        return self._ports

    async def warmed(self) -> str:
        """Wait for the models; return why they cannot be served, or an empty string when they are."""
        return await asyncio.shield(self._warming)

    async def drain(self) -> bool:
        """See `GatewayServer.drain`."""
        return await self._server.drain()

    async def __del__(self) -> None:
        """Drain; Serve awaits this when it stops the replica, whoever asked for it."""
        warming = [self._warming] if hasattr(self, "_warming") else []
        for task in (*warming, *getattr(self, "_generating", ())):
            task.cancel()
        if hasattr(self, "_server"):
            await self._server.drain()


def _deployment(replica: type) -> serve.Deployment:
    # Serve's decorator is typed for its form with arguments only.
    deployment: Any = serve.deployment(replica)
    return cast(serve.Deployment, deployment)


def placed(cpus: float, gpus: float, resource: str) -> dict[str, Any]:
    """Return the options of a replica's actor: what Ray reserves for it, and so where it runs.

    Parameters
    ----------
    cpus, gpus
        Cores and GPUs.
    resource
        Name of a custom resource of which it takes one; empty for none.
    """
    options: dict[str, Any] = {"num_cpus": cpus}
    if gpus:
        options["num_gpus"] = gpus
    if resource:
        options["resources"] = {resource: 1}
    return options


def scaled(fewest: int, most: int, target_ongoing: float) -> dict[str, Any]:
    """Return the options of a deployment for a fixed number of replicas, or for autoscaling.

    Parameters
    ----------
    fewest, most
        Replicas; fixed at `fewest` unless `most` is greater.
    target_ongoing
        Requests in progress a replica that Serve aims at.
    """
    if most <= fewest:
        return {"num_replicas": fewest}
    return {
        "autoscaling_config": {
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": target_ongoing,
            # A replica takes seconds to load its models, so it is wanted early and given up late.
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        }
    }


def build(settings: Settings) -> serve.Application:
    """Return the application that `settings` describe: one gateway, and an encoder and a generator a bundle.

    Raises
    ------
    BundleError, NamesClash
        As `read_served`.
    """
    served = read_served(settings)
    common: dict[str, Any] = {
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": settings.linger_s + settings.drain_s + 5.0,
    }
    gateway = _deployment(GatewayReplica).options(
        name="gateway",
        num_replicas=settings.gateway_replicas,
        # Two on one node would want the same port.
        max_replicas_per_node=1,
        ray_actor_options=placed(0, 0, settings.gateway_resource),
        **common,
    )
    encoders = [_encoder(bundle, common) for bundle in served]
    generators = [_generator(bundle, common) if bundle.draws else None for bundle in served]
    application: serve.Application = gateway.bind(settings, served, encoders, generators)
    return application


def _encoder(bundle: Served, common: dict[str, Any]) -> serve.Application:
    settings = bundle.settings
    deployment = _deployment(EncoderReplica).options(
        name=bundle.encoder,
        ray_actor_options=placed(settings.encoder_cpus, settings.encoder_gpus, settings.encoder_resource),
        # The batcher's queue is the bound; Serve's own would hold messages back from it.
        max_ongoing_requests=settings.max_queued_items,
        **scaled(settings.encoder_replicas, settings.encoder_max_replicas, settings.encoder_target_ongoing),
        **common,
    )
    application: serve.Application = deployment.bind(settings)
    return application


def _generator(bundle: Served, common: dict[str, Any]) -> serve.Application:
    settings = bundle.settings
    deployment = _deployment(GeneratorReplica).options(
        name=bundle.generator,
        ray_actor_options=placed(
            settings.generator_cpus, settings.generator_gpus, settings.generator_resource
        ),
        # The engine's queue is the bound.
        max_ongoing_requests=settings.max_queued_images + settings.max_batch_images,
        **scaled(
            settings.generator_replicas, settings.generator_max_replicas, settings.generator_target_ongoing
        ),
        **common,
    )
    application: serve.Application = deployment.bind(settings)
    return application


def from_config(arguments: dict[str, Any]) -> serve.Application:
    """Return the application for a Serve config file: its `args` are settings by their names.

    Raises
    ------
    ValueError
        For a name that is no setting, for a value out of range, and for two bundles of one name.
    BundleError
        When a bundle cannot be served.
    """
    unknown = sorted(set(arguments) - set(Settings.model_fields))
    if unknown:
        raise ValueError(f"no such settings: {', '.join(unknown)}")
    from services.bundle import Bundle

    settings = Settings(**arguments)
    # Each replica checks them again where it runs; here a bundle that cannot be served is told to whoever asks for it.
    for path in settings.served:
        Bundle.load(path)
    return build(settings)
