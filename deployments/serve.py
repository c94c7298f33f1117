"""The `monofacet serve` command: one machine, one local Ray, one clear line when ready, and a clean stop."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deployments.settings import Settings

# Set before Ray is imported; its processes inherit them. What the user has set already stays.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Replicas share the cores; threads that spin while they wait would take them from each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # No Ray port outward. Ray's own switch for "loopback only", whatever its name says.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's workers are nice (15) by default, for batch jobs beside a user. Whatever else ran would starve a server.
    "RAY_worker_niceness": "0",
    # Two idle workers would be started and never used.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # A start on a busy machine is slow, not wrong.
    "SERVE_SLOW_STARTUP_WARNING_S": "600",
    # Libraries that fork would have gRPC write a line for each fork.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Set after Ray Serve is imported: the replicas inherit them, and this process, which has no event loop, keeps
# its router in a thread. They save hops between threads on the way of a message.
REPLICA_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


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
        Path | None, typer.Option(help="Directory of the bundle. Default: the embedded one.")
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
) -> None:
    """Serve a bundle over gRPC until SIGTERM or Ctrl-C; calls in flight are finished first.

    Every other knob is an environment variable MONOFACET_<NAME>: see deployments/settings.py.
    """
    started = time.perf_counter()
    signals = _Signals()
    signals.install()
    flags = {
        "bundle": bundle,
        "host": host,
        "port": port,
        "metrics_port": metrics_port,
        "backend": backend,
        "threads": threads,
    }
    settings = _settings({name: value for name, value in flags.items() if value is not None})
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    try:
        with ThreadPoolExecutor(1) as beside:
            # Beside the start of Ray, which mostly waits for other processes.
            verifying = beside.submit(_verified, settings)
            with _LocalRay(settings):
                signals.install()
                bundle_id = verifying.result()
                gateway, ports = _run(settings)
                typer.echo(
                    f"monofacet: ready: {bundle_id} on {settings.host}:{ports[0]}, metrics on "
                    f"http://{settings.host}:{ports[1]}/metrics, after {time.perf_counter() - started:.1f} s"
                )
                signals.wait()
                typer.echo("monofacet: stopping; calls in flight are finished first")
                _stop(settings, gateway)
    except Stopped:
        pass
    typer.echo("monofacet: stopped")


def _settings(flags: dict[str, Any]) -> Settings:
    from pydantic import ValidationError

    from deployments.settings import Settings

    try:
        return Settings(**flags)
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            typer.echo(f"monofacet: {where}: {problem['msg']}", err=True)
        raise typer.Exit(2) from error


def _verified(settings: Settings) -> str:
    """Check every hash of the bundle before anything is loaded from it; return its id."""
    from services.bundle import Bundle
    from services.errors import BundleError

    try:
        return Bundle.load(settings.bundle).id
    except BundleError as error:
        typer.echo(f"monofacet: {settings.bundle}: {error}", err=True)
        raise typer.Exit(1) from error


class _LocalRay:
    """A Ray of our own for as long as the command runs: on loopback, without a dashboard, and gone after."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._directory = ""

    def __enter__(self) -> None:
        importlib.import_module("ray.serve")
        for name, value in REPLICA_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Unix sockets lie below it and their paths may have 107 characters, so it must be short.
        self._directory = tempfile.mkdtemp(prefix="mf-", dir="/tmp")
        try:
            self._start(attempts=3)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, attempts: int) -> None:
        import ray

        try:
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                object_store_memory=self._settings.object_store_bytes,
                logging_level=logging.ERROR,
                _temp_dir=self._directory,
            )
        except Exception:
            # Ray gives its own processes 30 s, which a busy machine may not keep, and cannot be told otherwise.
            ray.shutdown()
            if attempts == 1:
                raise
            self._start(attempts - 1)

    def __exit__(self, *exception: object) -> None:
        import ray

        ray.shutdown()
        # Ray's processes may write their last lines a moment after it returns.
        for _ in range(50):
            shutil.rmtree(self._directory, ignore_errors=True)
            if not os.path.exists(self._directory):
                break
            time.sleep(0.1)


def _run(settings: Settings) -> tuple[Any, tuple[int, int]]:
    """Start the application; return the gateway's handle and its two ports."""
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from deployments.app import APP_NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    # No proxy: the gateway is the only way in.
    ray_serve.start(proxy_location="Disabled", logging_config=quiet)
    gateway = ray_serve.run(build(settings), name=APP_NAME, route_prefix=None, logging_config=quiet)
    return gateway, gateway.ports.remote().result()


def _stop(settings: Settings, gateway: Any) -> None:
    from ray import serve as ray_serve

    from deployments.app import APP_NAME

    if not gateway.drain.remote().result(timeout_s=settings.drain_s + 10):
        typer.echo("monofacet: some calls were cut off", err=True)
    # Not serve.shutdown(): it kills Serve's controller while Ray still watches it, and Ray says so at length.
    ray_serve.delete(APP_NAME)
