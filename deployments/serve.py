"""The `monofacet serve` command: one machine, one local Ray, one clear line when ready, and a clean stop."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.environment import ENVIRONMENT, ONE_MACHINE, REPLICA_ENVIRONMENT
from services.absent import without

if TYPE_CHECKING:
    from deployments.settings import Settings

# Controller, gateway, encoder and generator: Ray starts a worker for each CPU that it is told of before they ask.
_WORKERS = 4
log = logging.getLogger("monofacet.command")


class Stopped(BaseException):
    """A signal asked to stop while the server was starting."""


class _Signals:
    """SIGTERM and SIGINT: while starting they interrupt, afterwards they end `wait`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._starting = True

    def install(self) -> None:
        """Take the signals; again after Ray has put its own handlers in place."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        if self._starting:
            self._starting = False
            raise Stopped

    def wait(self) -> None:
        """Block until a signal comes."""
        self._starting = False
        self._event.wait()


def serve(
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help="Directory of the bundle. Default: the embedded one. Several bundles: name each; the first answers "
            "requests that name none."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one. Default: 9000.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port; 0 takes a free one. Default: 9100.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="auto, torch or openvino. Default: auto.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of one forward. Default: the usable cores.")
    ] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Address of the metrics port. Default: 127.0.0.1.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the server's certificate; re-read when it changes.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of authorities whose certificates clients must show (mTLS).")
    ] = None,
    tokens_file: Annotated[
        Path | None,
        typer.Option(help="File of bearer tokens (see `monofacet token`); re-read when it changes."),
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow plain text on an address that is not loopback.")
    ] = None,
    reflection: Annotated[
        bool | None, typer.Option(help="Describe the services to grpcurl and friends. Default: yes.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, json or console. Default: auto.")] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. Default: info, a line a call.")
    ] = None,
) -> None:
    """Serve a bundle over gRPC until SIGTERM or Ctrl-C; calls in flight are finished first.

    Every other knob is an environment variable MONOFACET_<NAME>: see docs/operations.md.
    """
    started = time.perf_counter()
    signals = _Signals()
    signals.install()
    flags = {
        # Both, so that neither comes from the environment.
        "bundle": bundle[0] if bundle else None,
        "bundles": tuple(bundle) if bundle else None,
        "host": host,
        "port": port,
        "metrics_port": metrics_port,
        "backend": backend,
        "threads": threads,
        "metrics_host": metrics_host,
        "tls_certificate": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "tokens_file": tokens_file,
        "insecure": insecure,
        "reflection": reflection,
        "log_format": log_format,
        "log_level": log_level,
    }
    settings = _settings({name: value for name, value in flags.items() if value is not None})
    _check(settings)
    for name, value in (ENVIRONMENT | ONE_MACHINE).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    # Unix sockets lie below it and their paths may have 107 characters, so it must be short.
    directory = Path(tempfile.mkdtemp(prefix="mf-", dir="/tmp"))
    try:
        from deployments.logs import Collector, configure

        with Collector(directory), ThreadPoolExecutor(1) as beside:
            configure(settings.log_format, settings.log_level, "command")
            # Beside the start of Ray, which mostly waits for other processes.
            verifying = beside.submit(_verified, settings)
            with _LocalRay(settings, directory):
                signals.install()
                log.info("Ray runs")
                ids = verifying.result()
                log.info("the bundles are verified")
                gateway, ports, why = _run(settings)
                if why:
                    _say(f"not serving: {why}", err=True)
                else:
                    _say(
                        f"ready: {','.join(ids)} on {settings.host}:{ports[0]}, metrics on "
                        f"http://{settings.metrics_host}:{ports[1]}/metrics, "
                        f"after {time.perf_counter() - started:.1f} s"
                    )
                # Also when nothing can be served: health says NOT_SERVING, and restarting would hide why.
                signals.wait()
                _say("stopping; calls in flight are finished first")
                _stop(settings, gateway)
    except Stopped:
        pass
    finally:
        _remove(directory)
    _say("stopped")


def _say(line: str, err: bool = False) -> None:
    typer.echo(f"monofacet: {line}", err=err)


def _settings(flags: dict[str, Any]) -> Settings:
    from pydantic import ValidationError

    from deployments.logs import wants_json
    from deployments.settings import Settings

    try:
        settings = Settings(**flags)
        # The replicas have no terminal to look at.
        form = "json" if wants_json(settings.log_format) else "console"
        return settings.model_copy(update={"log_format": form})
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            what = problem["msg"].removeprefix("Value error, ")
            _say(f"{where}: {what}" if where else what, err=True)
        raise typer.Exit(2) from error


def _check(settings: Settings) -> None:
    """Stop with one line, before anything is started, when access or a port cannot work."""
    from deployments.access.check import AccessInvalid, open_certificate, open_tokens
    from deployments.served import NamesClash, read_served
    from deployments.settings import is_loopback
    from services.errors import BundleError

    try:
        read_served(settings)
    except NamesClash as error:
        _say(str(error), err=True)
        raise typer.Exit(2) from error
    except BundleError as error:
        _say(str(error), err=True)
        raise typer.Exit(1) from error
    try:
        open_certificate(settings)
        tokens = open_tokens(settings)
    except AccessInvalid as error:
        _say(str(error), err=True)
        raise typer.Exit(2) from error
    if tokens is None and settings.tls_client_ca is None and not is_loopback(settings.host):
        _say(
            f"warning: no tokens and no client certificates: all who reach {settings.host} may call", err=True
        )
    for host, port in (
        (settings.host, settings.port),
        (settings.host, settings.health_port),
        (settings.metrics_host, settings.metrics_port),
    ):
        if port:
            _check_port(host.strip("[]"), port)


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the servers do: a port in TIME_WAIT can be taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        _say(f"cannot listen on {host}:{port}: {error.strerror}", err=True)
        raise typer.Exit(2) from error


def _verified(settings: Settings) -> list[str]:
    """Check every hash of the bundles before anything is loaded from them; return their ids."""
    from services.bundle import Bundle
    from services.errors import BundleError

    ids = []
    for path in settings.served:
        try:
            ids.append(Bundle.load(path).id)
        except BundleError as error:
            _say(f"{path}: {error}", err=True)
            raise typer.Exit(1) from error
    return ids


class _LocalRay:
    """A Ray of our own for as long as the command runs: on loopback, without a dashboard, and gone after."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory

    def __enter__(self) -> None:
        # Ray Serve would take a second to import pandas, for answers that are tables.
        with without("pandas"):
            importlib.import_module("ray.serve")
        for name, value in REPLICA_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            self._start(attempts=3)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, attempts: int) -> None:
        import ray

        from deployments.local_ray import fewer_processes

        try:
            with fewer_processes():
                ray.init(
                    address="local",
                    num_cpus=_WORKERS,
                    include_dashboard=False,
                    object_store_memory=self._settings.object_store_bytes,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self._directory),
                )
        except Exception as error:
            # Ray gives its own processes 30 s, which a busy machine may not keep, and cannot be told otherwise.
            ray.shutdown()
            if attempts == 1:
                _say(f"cannot start: Ray: {str(error).splitlines()[0]}", err=True)
                raise typer.Exit(1) from error
            self._start(attempts - 1)

    def __exit__(self, *exception: object) -> None:
        import ray

        ray.shutdown()


def _remove(directory: Path) -> None:
    # Ray's processes may write their last lines a moment after it has stopped.
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            break
        time.sleep(0.1)


def _run(settings: Settings) -> tuple[Any, tuple[int, int], str]:
    """Start the application and wait until it is warm.

    Returns
    -------
    The gateway's handle, its two ports, and why it does not serve (empty when it does).
    """
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from deployments.app import APP_NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    # No proxy: the gateway is the only way in.
    ray_serve.start(proxy_location="Disabled", logging_config=quiet)
    log.info("Serve runs")
    try:
        gateway = ray_serve.run(build(settings), name=APP_NAME, route_prefix=None, logging_config=quiet)
        return gateway, gateway.ports.remote().result(), gateway.warmed.remote().result()
    except RuntimeError as error:
        # Ray gave up on a replica, such as one that the kernel kills for its memory each time it starts.
        why = str(error).strip().splitlines()[-1].strip()
        try:
            gateway = ray_serve.get_deployment_handle("gateway", APP_NAME)
            return gateway, gateway.ports.remote().result(timeout_s=10), why
        except Exception:  # no gateway to ask, for whatever reason: why the start failed is what counts
            _say(f"cannot start: {why}", err=True)
            raise typer.Exit(1) from error


def _stop(settings: Settings, gateway: Any) -> None:
    from ray import serve as ray_serve

    from deployments.app import APP_NAME

    if not gateway.drain.remote().result(timeout_s=settings.linger_s + settings.drain_s + 10):
        _say("some calls were cut off", err=True)
    # Not serve.shutdown(): it kills Serve's controller while Ray still watches it, and Ray says so at length.
    ray_serve.delete(APP_NAME)
