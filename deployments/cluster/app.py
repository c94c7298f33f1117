"""Builds the Ray Serve application from the settings: a gateway in front of encoders and generators."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.cluster.replicas import EncoderReplica, GeneratorReplica
from deployments.encoder.tasks import EncoderFault, EncoderInfo
from deployments.operations import logs
from deployments.operations.process import (
    confine_to_loopback,
    end_with_ray,
)
from deployments.operations.served import Served, load_served, read_served
from deployments.operations.settings import Settings

log = logging.getLogger("monofacet")

APP_NAME = "monofacet"
# Seconds between two looks for the file that asks a gateway to drain.
_DRAIN_POLL_S = 0.5
# Serve has no use for what the gateway asks of replicas by this name.
_UNASKED: Any = RequestRouterConfig(**cast(Any, {"request_routing_stats_period_s": 86_400.0}))
# Seconds after which encoders that could not be warmed are asked again.
_AGAIN_S = 5.0


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
        from deployments.cluster.handles import BundleModels
        from deployments.cluster.watch import RayReplicas, Watch
        from deployments.gateway.catalogue import Catalogue
        from deployments.gateway.server import GatewayServer

        confine_to_loopback(settings)
        end_with_ray(settings)
        logs.configure(settings.log_format, settings.log_level, "gateway")
        catalogues = [Catalogue.read(load_served(bundle.settings)) for bundle in served]
        self._server = GatewayServer(settings, *catalogues)
        self._models = [
            BundleModels(self._server, bundle, encoder, generator)
            for bundle, encoder, generator in zip(served, encoders, generators, strict=True)
        ]
        handles = {name: handle for models in self._models for name, handle in models.handles.items()}
        watch = Watch(RayReplicas(APP_NAME), handles, self._server.metrics)
        self._tasks = [asyncio.create_task(watch.run())]
        self._verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if settings.drain_file is not None:
            settings.drain_file.unlink(missing_ok=True)
            self._watching = asyncio.create_task(self._drain_once_there(settings.drain_file))
        grpc_port, metrics_port = await self._server.open()
        self._ports = grpc_port, metrics_port, self._server.http_port
        log.info("listening")
        warming = asyncio.create_task(self._serve_when_warm())
        warming.add_done_callback(self._warming_ended)
        self._tasks.append(warming)

    async def _serve_when_warm(self) -> None:
        infos = await self._infos()
        # Only what was asked for is served: a bundle left out would be missed by its callers alone.
        while faults := [
            f"{models.bundle.encoder}: {info.why}"
            for models, info in zip(self._models, infos, strict=True)
            if isinstance(info, EncoderFault)
        ]:
            log.error("not serving: %s", faults[0])
            self._decide(faults[0])
            await asyncio.sleep(_AGAIN_S)
            infos = await self._infos()
        await self._server.serve_all(
            [
                models.backend(info)
                for models, info in zip(self._models, infos, strict=True)
                if not isinstance(info, EncoderFault)
            ]
        )
        log.info("serving")
        self._tasks += [asyncio.create_task(models.generate_when_warm()) for models in self._models]
        self._decide("")

    async def _infos(self) -> list[EncoderInfo | EncoderFault]:
        return list(await asyncio.gather(*(models.encoder_info() for models in self._models)))

    def _decide(self, why: str) -> None:
        if not self._verdict.done():
            self._verdict.set_result(why)

    def _warming_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("not serving", exc_info=error)
            self._decide(f"{type(error).__name__}: {error}".splitlines()[0])

    async def _drain_once_there(self, file: Path) -> None:
        # Not `exists`, which raises where a folder on the way cannot be read.
        while not os.path.exists(file):
            await asyncio.sleep(_DRAIN_POLL_S)
        log.info("draining: %s is there", file.name)
        await self._server.drain()

    def ports(self) -> tuple[int, int, int]:
        """Return the gRPC port, the metrics port and the HTTP port; of the last 0 where none is served."""
        return self._ports

    async def warmed(self) -> str:
        """Wait for the models; return why they cannot be served yet, or an empty string when they are."""
        return await asyncio.shield(self._verdict)

    async def drain(self) -> bool:
        """See `GatewayServer.drain`."""
        return await self._server.drain()

    async def __del__(self) -> None:
        """Drain; Serve awaits this when it stops the replica, whoever asked for it."""
        for task in getattr(self, "_tasks", ()):
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
        # Three in a row must fail. The gateway's own watch is faster; this one is for what it does not see.
        "health_check_period_s": 5,
        "health_check_timeout_s": 20,
        "request_router_config": _UNASKED,
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
        # The engine's queue bounds what waits.
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
    from services.bundle.load import Bundle

    settings = Settings(**arguments)
    # Each replica checks them again where it runs; here a bundle that cannot be served is told to whoever asks for it.
    for path in settings.served:
        Bundle.load(path)
    return build(settings)
