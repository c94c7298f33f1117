"""Builds the Ray Serve application from the settings: a gateway in front of encoders."""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings
from typing import Any, cast

from ray import exceptions as ray_errors
from ray import serve
from ray.serve import exceptions as serve_errors

from deployments.gateway.errors import EncoderUnavailable
from deployments.settings import Settings
from deployments.work import EncoderInfo, Reply, ScoreRequest, Work
from services.errors import InvalidInput
from services.tables import ModalityTable

log = logging.getLogger("monofacet")

APP_NAME = "monofacet"

# What a handle raises when no replica could answer, as opposed to an answer that is an error.
_GONE = (
    ray_errors.RayActorError,
    ray_errors.ActorUnavailableError,
    ray_errors.NodeDiedError,
    serve_errors.DeploymentUnavailableError,
    serve_errors.BackPressureError,
)


def confine_to_loopback(settings: Settings) -> None:
    """Keep this replica's own port, where Serve unpickles what it gets, off the network.

    Serve binds it to every interface and has no setting for it. It is opened after the replica's
    constructor, which is where this is called.
    """
    if not settings.loopback_only:
        return
    from ray.serve._private import replica as module

    replica: Any = module
    bind = replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        port: int = bind(server, address.replace("[::]", "127.0.0.1"))
        return port

    replica.add_port_to_grpc_server = bind_to_loopback


def keep_libraries_quiet() -> None:
    """Keep OpenVINO from reporting each conversion to its makers, and torch from advertising its successor.

    Without its telemetry package, which has no switch but a file in the user's home, OpenVINO uses a stub.
    """
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")


class EncoderReplica:
    """A replica of the encoder; ready once it is warm.

    Parameters
    ----------
    settings
        Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        confine_to_loopback(settings)
        keep_libraries_quiet()
        # Imported in the replica: the process that only builds the application needs no torch.
        from deployments.encoder import Encoder
        from deployments.model import TowerModel, load_dictionaries
        from services.bundle import Bundle

        # The command verified the hashes before it started any replica.
        bundle = Bundle.load(settings.bundle, verify=False)
        model = TowerModel(bundle, settings)
        model.warm_up(settings.max_batch_items)
        self._encoder = Encoder(settings, model, load_dictionaries(bundle))

    async def encode(self, works: list[Work], remaining_s: list[float | None]) -> Reply:
        """See `deployments.encoder.Encoder.encode`."""
        return await self._encoder.encode(works, remaining_s)

    async def score(self, request: ScoreRequest) -> ModalityTable | InvalidInput:
        """See `deployments.encoder.Encoder.score`."""
        return await self._encoder.score(request)

    def info(self) -> EncoderInfo:
        """See `deployments.encoder.Encoder.info`."""
        return self._encoder.info()

    async def __del__(self) -> None:
        """Finish what is queued; Serve awaits this when it stops the replica."""
        if hasattr(self, "_encoder"):
            await self._encoder.close()


class GatewayReplica:
    """The replica that owns the gRPC server. It takes no Serve requests but the two of the command.

    Parameters
    ----------
    settings
        Of the server.
    encoder
        Handle of the encoder's deployment.
    """

    async def __init__(self, settings: Settings, encoder: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        from deployments.gateway.catalogue import Catalogue
        from deployments.gateway.server import GatewayServer
        from services.bundle import Bundle

        confine_to_loopback(settings)
        self._encoder = encoder
        catalogue = Catalogue.read(Bundle.load(settings.bundle, verify=False))
        self._server = GatewayServer(settings, catalogue)
        # The first answer of an encoder comes after its warm-up, so from here on the service can be SERVING.
        info = await encoder.info.remote()
        self._ports = await self._server.start(self._encode, self._score, info)

    async def _encode(self, works: list[Work], remaining_s: list[float | None]) -> Reply:
        reply: Reply = await self._call(self._encoder.encode, works, remaining_s)
        return reply

    async def _score(self, request: ScoreRequest) -> ModalityTable:
        answer: ModalityTable | InvalidInput = await self._call(self._encoder.score, request)
        if isinstance(answer, InvalidInput):
            raise answer
        return answer

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call the encoder; once more if its replica died, since every call can be repeated unharmed."""
        for attempt in (1, 2):
            response = method.remote(*args)
            try:
                return await response
            except _GONE as error:
                log.warning("no answer from the encoder (%s), attempt %d", type(error).__name__, attempt)
            except asyncio.CancelledError:
                response.cancel()
                raise
        raise EncoderUnavailable("the model is not available; try later")

    def ports(self) -> tuple[int, int]:
        """Return the gRPC port and the metrics port."""
        return self._ports

    async def drain(self) -> bool:
        """See `GatewayServer.drain`."""
        return await self._server.drain()

    async def __del__(self) -> None:
        """Drain; Serve awaits this when it stops the replica, whoever asked for it."""
        if hasattr(self, "_server"):
            await self._server.drain()


def _deployment(replica: type) -> serve.Deployment:
    # Serve's decorator is typed for its form with arguments only.
    deployment: Any = serve.deployment(replica)
    return cast(serve.Deployment, deployment)


def build(settings: Settings) -> serve.Application:
    """Return the application that `settings` describe.

    One machine needs no resources reserved: threads are set explicitly, and Ray's own accounting would only
    keep a small machine from starting.
    """
    grace_s = settings.drain_s + 5.0
    common: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": grace_s,
    }
    encoder = (
        _deployment(EncoderReplica)
        .options(
            name="encoder",
            num_replicas=settings.encoder_replicas,
            # The batcher's queue is the bound; Serve's own would hold messages back from it.
            max_ongoing_requests=settings.max_queued_items,
            **common,
        )
        .bind(settings)
    )
    gateway = _deployment(GatewayReplica).options(name="gateway", num_replicas=1, **common)
    application: serve.Application = gateway.bind(settings, encoder)
    return application
