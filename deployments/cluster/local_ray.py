"""Ray on one machine: private, and without the processes that a cluster of one node has no use for."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deployments.operations.environment import ENVIRONMENT, ONE_MACHINE, PRIVATE, REPLICA_ENVIRONMENT
from services.encoding.import_trimming import without

# Controller, gateway, encoder and generator: Ray starts a worker for each CPU that it is told of before they ask.
_WORKERS = 4
# Ray's own processes without which nothing goes on, as the kernel calls them.
_VITAL = ("gcs_server", "raylet")
log = logging.getLogger("monofacet.command")


def make_private(environment: MutableMapping[str, str]) -> list[str]:
    """Set the environment of a Ray of our own; before Ray is imported, which reads it then.

    Returns
    -------
    Names of the variables that were taken out of it.
    """
    ours = ENVIRONMENT | ONE_MACHINE
    foreign = sorted(
        name for name in environment if name.startswith("RAY_") and name not in ours | REPLICA_ENVIRONMENT
    )
    for name in foreign:
        del environment[name]
    for name, value in ours.items():
        environment.setdefault(name, value)
    # Another user cannot read the environment of these processes.
    environment.update(PRIVATE | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    return foreign


def start_ray(directory: Path, object_store_bytes: int) -> None:
    """Start Ray on loopback, without a dashboard.

    Parameters
    ----------
    directory
        Where it keeps its files and sockets.
    object_store_bytes
        Its shared memory.
    """
    # Ray Serve would take a second to import pandas, for answers that are tables.
    with without("pandas"):
        importlib.import_module("ray.serve")
    for name, value in REPLICA_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    with fewer_processes():
        ray.init(
            address="local",
            num_cpus=_WORKERS,
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            logging_level=logging.ERROR,
            _temp_dir=str(directory),
        )


def stop_forwarding() -> None:
    """Print no more of what Ray's processes print: while they end, their complaints about each other mean nothing."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")


def watch_ray(lost: Callable[[str], None], period_s: float = 1.0) -> None:
    """Call `lost`, from a thread, with the name of one of Ray's own processes once it has died.

    Ray itself goes on: its command waits for an answer, and its workers serve what they can without a node.
    """

    def look() -> None:
        while True:
            for name in dead_children():
                if name in _VITAL:
                    lost(name)
                    return
            sleeping.wait(period_s)

    sleeping = threading.Event()
    threading.Thread(target=look, name="watch-ray", daemon=True).start()


def dead_children() -> list[str]:
    """Return the names of this process's children that have ended and that nobody has waited for."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    before, _, after = Path(f"/proc/{child}/stat").read_text().rpartition(")")
                    if after.split()[0] == "Z":
                        names.append(before.partition("(")[2])
    return names


@contextmanager
def fewer_processes() -> Iterator[None]:
    """Start Ray without its autoscaler, which has no nodes to add, and without its dashboard's server.

    Ray has no switch for either in `ray.init`; `include_dashboard=False` starts the dashboard's server none the less,
    only empty, and waits for it. Together they take 130 MB, and two seconds of the start.
    """
    from ray._private.node import Node

    node: Any = Node
    before = node.start_monitor, node.start_api_server

    def start_no_monitor(self: Any) -> None:
        pass

    def start_no_api_server(self: Any, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        self._webui_url = ""

    node.start_monitor, node.start_api_server = start_no_monitor, start_no_api_server
    try:
        yield
    finally:
        node.start_monitor, node.start_api_server = before
