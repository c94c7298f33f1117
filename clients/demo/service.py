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
START_LIMIT_S = 180
STOP_LIMIT_S = 60


class Service:
    """A service that runs.

    Attributes
    ----------
    target : str
        ``host:port`` of the gateway.
    """

    def __init__(self, process: subprocess.Popen[bytes], target: str) -> None:
        self._process, self.target = process, target

    def stop(self) -> None:
        """Ask it to drain and end, without waiting for that."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


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
    RuntimeError
        If the service does not come up, or does not end with exit code 0.
    """
    command = [
        str(Path(sys.executable).parent / "monofacet"),
        "serve",
        "--bundle",
        str(bundle),
        "--port",
        "0",
    ]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--metrics-port", "0"], stdout=output, stderr=subprocess.STDOUT)
    service = Service(process, "")
    try:
        with console.status("starting the service"):
            service.target = _wait_until_ready(process, log)
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
        raise RuntimeError(f"the service ended with exit code {code}: see {log}")
    console.print("the service stopped cleanly")


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if found := READY.search(log.read_text(encoding="utf-8", errors="replace")):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the service did not start: see {log}")
