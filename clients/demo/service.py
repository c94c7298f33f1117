"""Start `monofacet serve` on free ports, wait until it is healthy, and stop it cleanly."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

READY = re.compile(r"ready: .* on (\S+:\d+), metrics on")
# Bounds for a machine whose cores are all taken by something else; 20 s and 3 s on two idle ones.
START_LIMIT_S = 900
STOP_LIMIT_S = 300
# How often a start that takes long says how far it is.
TELL_S = 15


class ServiceError(Exception):
    """The service did not start, or did not end as it should."""


class Service:
    """A service that runs.

    Attributes
    ----------
    target : str
        ``host:port`` of the gateway.
    """

    def __init__(self, process: subprocess.Popen[bytes], target: str) -> None:
        self._process, self.target = process, target
        self._asked = False

    def stop(self) -> None:
        """Ask it once to drain and end, without waiting for that."""
        if not self._asked and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._asked = True


@contextmanager
def running_service(bundle: Path, log: Path, console: Console) -> Iterator[Service]:
    """Serve a bundle for the length of a block, or until `Service.stop`; at the block's end it has ended.

    Parameters
    ----------
    bundle : Path
        The bundle's folder.
    log : Path
        Where the service's output goes.
    console : Console
        Where progress is shown.

    Yields
    ------
    Service
        Healthy.

    Raises
    ------
    ServiceError
        If the service does not come up, or does not end with exit code 0.
    """
    command = [str(Path(sys.executable).parent / "monofacet"), "serve", "--bundle", str(bundle)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", "0", "--metrics-port", "0"], stdout=output, stderr=subprocess.STDOUT
        )
    service = Service(process, "")
    try:
        console.print("starting the service: about 20 s on two idle cores, minutes on busy ones")
        service.target = _wait_until_ready(process, log, console)
        console.print(f"serving {bundle.name} on {service.target}")
        yield service
    finally:
        service.stop()
        try:
            code = process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code:
        raise ServiceError(f"the service ended with exit code {code}; {_last_lines(log)}")
    console.print("the service stopped cleanly")


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, console: Console) -> str:
    began = reported = time.monotonic()
    while (now := time.monotonic()) < began + START_LIMIT_S:
        # First whether it lives: what it said last is then in the log.
        ended = process.poll() is not None
        if found := READY.search(_read(log)):
            return found[1]
        if ended:
            raise ServiceError(f"the service ended with exit code {process.returncode}; {_last_lines(log)}")
        if now > reported + TELL_S:
            reported = now
            console.print(f"  still starting after {now - began:.0f} s; {_last_lines(log, 1)}")
        time.sleep(0.1)
    raise ServiceError(f"the service was not ready after {START_LIMIT_S} s; {_last_lines(log)}")


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _last_lines(log: Path, lines: int = 10) -> str:
    """Return the last lines of the log, and where the rest is."""
    last = "\n".join(_read(log).splitlines()[-lines:])
    return f"{log} ends with:\n{last}" if last else f"{log} is empty"
