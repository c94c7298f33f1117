"""The `monofacet serve` command: one machine, one local Ray, one clear line when ready, and a clean stop."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from deployments.cluster.supervisor import Signals

if TYPE_CHECKING:
    from deployments.cluster.scratch import Scratch
    from deployments.operations.settings import Settings

# Seconds that the server may take to end beyond what its settings give to the calls.
_MARGIN_S = 25.0


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
    http_port: Annotated[
        int | None,
        typer.Option(help="HTTP port; 0 takes a free one. Default: 8080; where --port is 0, a free one."),
    ] = None,
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
    """Serve a bundle over gRPC and HTTP until SIGTERM, SIGHUP or Ctrl-C; calls in flight are finished first.

    Every other knob is an environment variable MONOFACET_<NAME>: see docs/operations.md.
    """
    started = time.perf_counter()
    flags = {
        # Both, so that neither comes from the environment.
        "bundle": bundle[0] if bundle else None,
        "bundles": tuple(bundle) if bundle else None,
        "host": host,
        "port": port,
        "http_port": http_port,
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
    with Signals() as signals:
        settings = _settings({name: value for name, value in flags.items() if value is not None})
        scratch = _scratch(settings)
        _watch_over(with_free_http_port(settings), scratch, signals, started)


def _scratch(settings: Settings) -> Scratch:
    """Return the folder of a server that can be started; else stop with one line."""
    from deployments.cluster.scratch import NoScratch, Scratch, sweep

    # First: what a killed server has left may hold the ports.
    for left in sweep(os.environ):
        _say(f"removed {left}, left by a server that was killed", err=True)
    _check(settings)
    try:
        return Scratch.make(os.environ)
    except NoScratch as error:
        _say(str(error), err=True)
        raise typer.Exit(2) from error


def _watch_over(settings: Settings, scratch: Scratch, signals: Signals, started: float) -> NoReturn:
    """Run the server in a child until it ends, remove what there was of it, and end with its exit code."""
    from deployments.cluster import machine
    from deployments.cluster.supervisor import supervise

    code = 1
    try:
        code = supervise(
            lambda link: machine.run(settings, scratch, link, started),
            signals,
            _say,
            scratch.remove,
            settings.linger_s + settings.drain_s + _MARGIN_S,
        )
    finally:
        # From here on no signal can change how this ends: not by the default action that Python gives back either.
        signals.ignore()
        scratch.remove()
        if code == 0:
            _say("stopped")
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _say(line: str, err: bool = False) -> None:
    from deployments.cluster.machine import say

    say(line, err)


def _settings(flags: dict[str, Any]) -> Settings:
    from pydantic import ValidationError

    from deployments.operations.logs import wants_json
    from deployments.operations.settings import Settings, service_links

    for name in service_links(os.environ):
        _say(f"{name} is not read: Kubernetes set it for a Service of this name", err=True)
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
    from deployments.operations.addresses import is_loopback
    from deployments.operations.served import NamesClash, read_served
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
    _check_port(settings.host, settings.port)
    _check_port(settings.metrics_host, settings.metrics_port)
    if settings.http and "http_port" in settings.model_fields_set:
        _check_port(settings.host, settings.http_port)
    if settings.health_port:
        _check_port(settings.host, settings.health_port)
    if tokens is None and settings.tls_client_ca is None and not is_loopback(settings.host):
        _say(
            f"warning: no tokens and no client certificates: all who reach {settings.host} may call", err=True
        )


def with_free_http_port(settings: Settings) -> Settings:
    """Return the settings with a free port for HTTP where the default one is taken: nobody asked for that one."""
    if not settings.http or "http_port" in settings.model_fields_set:
        return settings
    if not (why := _port_refused(settings.host, settings.http_port)):
        return settings
    _say(f"HTTP takes a free port, for {settings.http_port} is not to be had: {why}", err=True)
    return settings.model_copy(update={"http_port": 0})


def _check_port(host: str, port: int) -> None:
    """Stop with one line where a server could listen at none of the host's addresses, or where one is taken."""
    from deployments.operations.addresses import joined

    if why := _port_refused(host, port):
        _say(f"cannot listen on {joined(host, port)}: {why}", err=True)
        raise typer.Exit(2)


def _port_refused(host: str, port: int) -> str:
    """Return why a server cannot listen there; empty where it can."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        refused = [error for *where, address in found if (error := _refused(where, address))]
        for error in refused:
            # A machine without IPv6 may know an address of that kind for a name, and listens at the other.
            if error.errno != errno.EADDRNOTAVAIL or len(refused) == len(found):
                raise error
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or "no such host"
    return ""


def _refused(where: list[Any], address: Any) -> OSError | None:
    family, kind, protocol, _ = where
    try:
        with socket.socket(family, kind, protocol) as probe:
            # As the servers do: a port in TIME_WAIT can be taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
