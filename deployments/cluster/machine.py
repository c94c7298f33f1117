"""The server of one machine, below the process that watches over it: starts Ray and the application, waits, drains."""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import typer

from deployments.cluster.local_ray import make_private, start_ray, stop_forwarding, watch_ray
from deployments.cluster.scratch import Scratch
from deployments.cluster.supervisor import TRY_AGAIN, Link
from deployments.operations.addresses import joined
from deployments.operations.logs import Collector, configure
from deployments.operations.settings import Settings

# Seconds after which the start says what it waits for, again and again.
_STILL_S = 10.0
# Seconds that Serve may take to stop replicas which have nothing left to do.
_DELETE_S = 10.0
log = logging.getLogger("monofacet.command")


def say(line: str, err: bool = False) -> None:
    """Tell the user; one who has gone (a closed pipe, a terminal that hung up) changes nothing."""
    with suppress(OSError, ValueError):
        typer.echo(f"monofacet: {line}", err=err)


class Progress:
    """Says every 10 s what the start waits for, until it is done."""

    def __init__(self) -> None:
        self.phase = ""
        self.done = threading.Event()
        self._began = time.monotonic()
        threading.Thread(target=self._tell, name="progress", daemon=True).start()

    def _tell(self) -> None:
        while not self.done.wait(_STILL_S):
            say(f"starting for {time.monotonic() - self._began:.0f} s: {self.phase}", err=True)


def run(settings: Settings, scratch: Scratch, link: Link, began: float) -> int:
    """Serve until told to stop.

    Parameters
    ----------
    settings
        Of the server.
    scratch
        Its folder.
    link
        To the process that watches over this one.
    began
        When the command was started, as `time.perf_counter` says.

    Returns
    -------
    Exit code, or `TRY_AGAIN` when Ray could not be started.
    """
    scratch.clear()
    foreign = make_private(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    progress = Progress()

    def lost(name: str) -> None:
        starting = not progress.done.is_set()
        say(f"{'cannot start' if starting else 'cannot go on'}: Ray: its process {name} has died", err=True)
        os._exit(TRY_AGAIN if starting else 1)

    with Collector(scratch.path), ThreadPoolExecutor(1) as beside:
        configure(settings.log_format, settings.log_level, "command")
        for why in scratch.passed_over:
            log.warning("the temporary folder is not made in %s", why)
        if foreign:
            log.info("not passed on, since Ray is private: %s", ", ".join(foreign))
        # Beside the start of Ray, which mostly waits for other processes.
        verifying = beside.submit(_verified, settings)
        watch_ray(lost)
        progress.phase = "Ray starts its processes"
        try:
            start_ray(scratch.path, settings.object_store_bytes)
        except Exception as error:
            progress.done.set()
            say(f"cannot start: Ray: {str(error).splitlines()[0]}", err=True)
            return TRY_AGAIN
        log.info("Ray runs")
        progress.phase = "the hashes of the bundles are checked"
        ids = verifying.result()
        log.info("the bundles are verified")
        gateway, ports, why = _serve(settings, progress)
        progress.done.set()
        # Also when nothing can be served: health says NOT_SERVING, and restarting would hide why.
        link.serving()
        if why:
            say(f"not serving: {why}", err=True)
        else:
            scheme = "http" if settings.tls_certificate is None else "https"
            http = f"HTTP on {scheme}://{joined(settings.host, ports[2])}, " if ports[2] else ""
            say(
                f"ready: {','.join(ids)} on {joined(settings.host, ports[0])}, metrics on "
                f"http://{joined(settings.metrics_host, ports[1])}/metrics, {http}"
                f"after {time.perf_counter() - began:.1f} s"
            )
        link.wait()
        _stop(settings, gateway)
    return 0


def _verified(settings: Settings) -> list[str]:
    """Check every hash of the bundles before anything is loaded from them; return their ids."""
    from services.bundle.load import Bundle
    from services.errors import BundleError

    ids = []
    for path in settings.served:
        try:
            ids.append(Bundle.load(path).id)
        except BundleError as error:
            say(f"{path}: {error}", err=True)
            raise SystemExit(1) from error
    return ids


def _serve(settings: Settings, progress: Progress) -> tuple[Any, tuple[int, int, int], str]:
    """Start the application and wait until it is warm.

    Returns
    -------
    The gateway's handle, its ports (gRPC, metrics, HTTP), and why it does not serve (empty when it does).
    """
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from deployments.cluster.app import APP_NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    progress.phase = "Ray Serve starts its controller"
    # No proxy: the gateway is the only way in.
    ray_serve.start(proxy_location="Disabled", logging_config=quiet)
    log.info("Serve runs")
    try:
        progress.phase = "the models are loaded"
        gateway = ray_serve.run(build(settings), name=APP_NAME, route_prefix=None, logging_config=quiet)
        ports = gateway.ports.remote().result()
        progress.phase = "the models are warmed"
        return gateway, ports, gateway.warmed.remote().result()
    except RuntimeError as error:
        # Ray gave up on a replica, such as one that the kernel kills for its memory each time it starts.
        why = str(error).strip().splitlines()[-1].strip()
        try:
            gateway = ray_serve.get_deployment_handle("gateway", APP_NAME)
            return gateway, gateway.ports.remote().result(timeout_s=10), why
        except Exception:  # no gateway to ask, for whatever reason: why the start failed is what counts
            say(f"cannot start: {why}", err=True)
            raise SystemExit(1) from error


def _stop(settings: Settings, gateway: Any) -> None:
    """Finish the calls; whatever goes wrong on the way, the process that watches ends all that is left."""
    from ray import serve as ray_serve

    from deployments.cluster.app import APP_NAME

    try:
        finished = gateway.drain.remote().result(timeout_s=settings.linger_s + settings.drain_s + 10)
    except Exception as error:  # it may be late, dead or hung
        log.debug("the gateway did not drain: %r", error)
        finished = False
    if not finished:
        say("some calls were cut off", err=True)
    stop_forwarding()
    # Replicas close what they hold. Not serve.shutdown(): it kills Serve's controller while Ray still watches it, and
    # Ray logs that as an error of many lines.
    deleting = threading.Thread(target=_deleted, args=(ray_serve, APP_NAME), daemon=True)
    deleting.start()
    deleting.join(_DELETE_S)


def _deleted(ray_serve: Any, name: str) -> None:
    with suppress(Exception):
        ray_serve.delete(name)
