"""The gateway's `grpc.aio` server: how it opens, serves, says whether it is healthy, and stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import model_service_pb2_grpc

from deployments.access.check import open_certificate, open_tokens
from deployments.access.scopes import check_scopes
from deployments.batching import QueueFull
from deployments.encoder.tasks import EncoderInfo
from deployments.gateway.admission.client_streams import ClientStreams
from deployments.gateway.bundles import Backend, Bundles, Routed, Score, Stream
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.deferred import DeferredServices
from deployments.gateway.encoder_client import EncoderClient, Send
from deployments.gateway.health import Health
from deployments.gateway.interceptors.access import Access
from deployments.gateway.interceptors.chain import Call, Chain
from deployments.gateway.interceptors.limits import Admission
from deployments.gateway.interceptors.reading import Requests
from deployments.gateway.interceptors.traces import encoder_spans, start_tracing
from deployments.gateway.layers import SMALL_BYTES, gateway_chain
from deployments.gateway.metrics_server import MetricsServer
from deployments.gateway.reflection import add_reflection
from deployments.gateway.servicers.model import ModelServicer
from deployments.gateway.services import DESCRIPTORS, ENCODING, IMAGING, ROUTED, SERVICES, servicers_of
from deployments.gateway.transport import options
from deployments.generator.events import GeneratorInfo
from deployments.operations.addresses import joined
from deployments.operations.limits import MIB
from deployments.operations.metrics import Metrics
from deployments.operations.served import deployment_of
from deployments.operations.settings import Settings

log = logging.getLogger("monofacet.gateway")

# A message a little over the limit is answered by us, with a reason; only a far larger one by gRPC itself.
_SLACK_BYTES = 2 * MIB
# Requests to health that are read at once, apart from all others: whatever the load, it must answer.
_HEALTH_READS = 4
# Seconds in which such a request must have come.
_HEALTH_READ_S = 5.0
# Seconds between two looks whether the tokens of the calls in progress are still in force.
_LOOK_AT_TOKENS_S = 1.0
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GatewayServer:
    """One gRPC server with its metrics port.

    It is opened before the models are warm, so that a prober reads NOT_SERVING and a caller is told to come
    back; `serve` then adds the services, and `drain` ends it.

    Parameters
    ----------
    settings
        Of the server.
    catalogue, others
        What is served; the first answers requests that name no bundle.

    Raises
    ------
    AccessInvalid
        When certificates or tokens cannot be used.
    MethodWithoutScope
        When a method has no row in the table of scopes.
    """

    def __init__(self, settings: Settings, catalogue: Catalogue, *others: Catalogue) -> None:
        check_scopes(DESCRIPTORS)
        self._settings = settings
        self._bundles = Bundles([catalogue, *others])
        self.metrics = Metrics()
        self._admission = Admission(settings.max_concurrent_calls)
        largest = settings.max_request_bytes + _SLACK_BYTES
        self._requests = Requests(
            settings.max_held_bytes,
            largest,
            settings.read_s,
            settings.read_patience_s,
            settings.max_streams,
            settings.stream_idle_s,
            settings.stream_patience_s,
        )
        self._health_requests = Requests(
            _HEALTH_READS * largest, largest, _HEALTH_READ_S, _HEALTH_READ_S / 4, 1, 1, 1
        )
        self._client_streams = ClientStreams(settings.max_client_streams, settings.client_stream_idle_s)
        self._health = Health(settings.max_watchers)
        self._show_limits()
        self._certificate = open_certificate(
            settings, self.metrics.tls_expiry.set, self.metrics.tls_refused.inc
        )
        self._access = Access(open_tokens(settings))
        self._looking: asyncio.Task[None] | None = None
        self._traces, self._stop_traces = None, _nothing
        if settings.otlp_endpoint:
            self._traces, self._stop_traces = start_tracing(settings.otlp_endpoint, self.bundle_id)
        chain = gateway_chain(
            settings,
            self.metrics,
            self._traces,
            self._access,
            [self._admission.layer, self._shut_layer],
            self._requests,
            self._health_requests,
        )
        self._server: Any = aio.server(interceptors=[chain], options=options(settings, largest))
        self._alive = dict.fromkeys(self._bundles, True)
        self._draining = False
        self._encoders: list[EncoderClient] = []
        self._services = DeferredServices()
        self._server.add_generic_rpc_handlers((self._services,))
        self._http = self._http_server(chain) if settings.http else None
        self.http_port = 0
        # Of the bundles whose images are made here.
        self._alive_generators: dict[str, bool] = {}
        self._model_servicer: ModelServicer | None = None
        self._health_server: Any = None
        self._metrics_server: Any = None

    def _show_limits(self) -> None:
        settings, shown = self._settings, self.metrics.limited
        shown("max_concurrent_calls", settings.max_concurrent_calls, lambda: self._admission.calls)
        shown("max_client_streams", settings.max_client_streams, lambda: self._client_streams.streams)
        shown("max_held_bytes", settings.max_held_bytes, lambda: self._requests.bytes)
        shown("max_streams", settings.max_streams, lambda: self._requests.streams)

    def _http_server(self, chain: Chain) -> Any:
        """Return the server of the HTTP port, whose calls go through the same chain."""
        # Here: who serves no HTTP imports nothing of it.
        from deployments.gateway.http.app import application
        from deployments.gateway.http.calls import Calls
        from deployments.gateway.http.server import HttpServer

        calls = Calls(chain, self._services)
        return HttpServer(
            self._settings, application(self._settings, calls, DESCRIPTORS, self._health.serving)
        )

    @asynccontextmanager
    async def _shut_layer(self, call: Call) -> AsyncIterator[None]:
        """Refuse a call unread because every encoder is overloaded.

        With several bundles one of them may still take the call, and its own backlog decides.
        """
        if call.method in ENCODING and self._encoders and all(e.shut(call.caller) for e in self._encoders):
            for encoder in self._encoders:
                encoder.refuse()
            raise QueueFull
        yield

    async def _look_at_tokens(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_AT_TOKENS_S)
            self._access.look()

    async def open(self) -> tuple[int, int]:
        """Listen, and say NOT_SERVING.

        Returns
        -------
        The gRPC port and the metrics port.

        Raises
        ------
        RuntimeError, OSError
            When a port is taken.

        Notes
        -----
        `http_port` is the port of HTTP from here on; 0 where none is served.
        """
        settings = self._settings
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            add_reflection((*SERVICES, HEALTH), self._server)
        self._set_health(_NOT_SERVING)
        address = joined(settings.host, settings.port)
        if self._certificate is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, self._certificate.credentials())
        await self._server.start()
        if self._http is not None:
            self.http_port = await self._http.open()
        self._looking = asyncio.create_task(self._look_at_tokens())
        if settings.health_port:
            # Plain text, for whoever reaches it: what it reads is bounded by gRPC itself.
            self._health_server = aio.server(
                interceptors=[Chain({}, untaken_s=settings.untaken_s)],
                options=options(settings, SMALL_BYTES),
            )
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
            self._health_server.add_insecure_port(joined(settings.host, settings.health_port))
            await self._health_server.start()
        self._metrics_server = MetricsServer(
            settings.metrics_host, settings.metrics_port, self.metrics.registry
        )
        return port, self.metrics_port

    async def serve(
        self, send: Send, score: Score, info: EncoderInfo, generate: Stream | None = None
    ) -> None:
        """Serve the one bundle; see `serve_all`."""
        await self.serve_all([Backend(send, score, info, generate)])

    async def serve_all(self, backends: Sequence[Backend]) -> None:
        """Serve; called once every encoder is warm. Images are made from `generate` on.

        Parameters
        ----------
        backends
            What computes for each bundle, in the order of the catalogues.
        """
        for name, backend in zip(self._bundles, backends, strict=True):
            if backend.generate is not None:
                self._alive_generators[name] = False
            bundle = self._bundles[name].bundle
            self.metrics.model_info.labels(bundle.id, bundle.sha256, backend.info.device).set(1)
        self._add_services(backends)
        self._admission.open = True
        for name in self._bundles:
            await self.set_serving(True, name)

    async def start(self, send: Send, score: Score, info: EncoderInfo) -> tuple[int, int]:
        """Open and serve at once; return the gRPC port and the metrics port."""
        ports = await self.open()
        await self.serve(send, score, info)
        return ports

    async def generate(self, info: GeneratorInfo, bundle: str = "") -> None:
        """Say SERVING for images too; called once the generator of a bundle (by default the first) is warm."""
        if self._model_servicer is not None:
            self._model_servicer.set_generator(bundle or self._bundles.default, info)
        await self.set_generating(True, bundle)

    def _add_services(self, backends: Sequence[Backend]) -> None:
        made = {
            name: self._servicers(name, backend)
            for name, backend in zip(self._bundles, backends, strict=True)
        }
        for descriptor, add in ROUTED:
            servicers = {name: servicers[descriptor.name] for name, servicers in made.items()}
            ids = {name: self._bundles[name].bundle.id for name in self._bundles}
            add(Routed(descriptor, servicers, self._bundles.resolve, ids), self._services)
        self._model_servicer = ModelServicer(self._bundles, backends, self._encoders, self._settings)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self._model_servicer, self._services)

    def _servicers(self, name: str, backend: Backend) -> dict[str, Any]:
        """Return the servicers of one bundle, by the name of their service."""

        def traced(queue_s: float, inference_s: float) -> None:
            encoder_spans(self._traces, queue_s, inference_s)

        default = name == self._bundles.default
        encoder = EncoderClient(
            backend.send,
            self._settings,
            self.metrics,
            backend.info.backend,
            traced,
            lambda: self._alive[name],
            deployment_of("encoder", name, default),
        )
        self._encoders.append(encoder)
        return servicers_of(
            backend,
            self._bundles[name],
            encoder,
            deployment_of("generator", name, default),
            self._client_streams,
            self._settings,
            self.metrics,
        )

    @property
    def bundle_id(self) -> str:
        """Id of the bundle that answers requests which name none."""
        return self._bundles[self._bundles.default].bundle.id

    @property
    def metrics_port(self) -> int:
        """Port of the metrics, once started."""
        return int(self._metrics_server.server_port)

    async def set_serving(self, serving: bool, bundle: str = "") -> None:
        """Say whether an encoder of a bundle (by default the first) is there.

        Health says SERVING while any is; a server that drains keeps NOT_SERVING.
        """
        self._alive[bundle or self._bundles.default] = serving
        await self._tell()

    async def set_generating(self, generating: bool, bundle: str = "") -> None:
        """Say whether a generator of a bundle is there; the other services do without."""
        self._alive_generators[bundle or self._bundles.default] = generating
        await self._tell()

    async def _tell(self) -> None:
        if not self._draining:
            serving = self._admission.open and any(self._alive.values())
            self._set_health(_SERVING if serving else _NOT_SERVING)

    async def drain(self) -> bool:
        """Say NOT_SERVING, take what is on its way, refuse new calls, wait for those in flight, and stop.

        Returns
        -------
        Whether every call in flight finished by itself in time.
        """
        self.metrics.draining.set(1)
        first, self._draining = not self._draining, True
        self._set_health(_NOT_SERVING)
        self._health.end()
        if first:
            # What was sent before its caller could know has not arrived yet, and would be refused.
            await asyncio.sleep(self._settings.linger_s)
        self._admission.close()
        self._requests.drain()
        closing = (
            asyncio.create_task(self._http.close(self._settings.drain_s)) if self._http is not None else None
        )
        stopping: asyncio.Task[None] | None = None
        if self._health_server is not None:
            # Health has a port of its own, so this one closes at once: open connections are told to go to
            # another gateway, instead of being refused here until the last call has finished.
            stopping = asyncio.create_task(self._server.stop(self._settings.drain_s))
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._admission.idle()
        except TimeoutError:
            log.warning("calls in flight were cut off after %.0f s", self._settings.drain_s)
            finished = False
        else:
            finished = True
        # Health stays reachable until here, so that a prober reads NOT_SERVING and not a refused connection.
        await (stopping or self._server.stop(1.0))
        if closing is not None:
            await closing
        if self._health_server is not None:
            await self._health_server.stop(None)
        if self._metrics_server is not None:
            self._metrics_server.close()
            self._metrics_server = None
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.to_thread(self._stop_traces)
        return finished

    def _set_health(self, status: Any) -> None:
        for name in ("", *SERVICES):
            lost = self._alive_generators and not any(self._alive_generators.values())
            said = _NOT_SERVING if name == IMAGING and lost else status
            self._health.set(name, said)
            self.metrics.serving.labels(name or "server").set(said == _SERVING)


def _nothing() -> None:
    """Stop no traces."""
