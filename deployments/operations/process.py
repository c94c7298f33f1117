"""What a replica does to its own process before and after it loads a model."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

from deployments.operations.settings import Settings

# Linux: a signal to this process once the thread that started it has ended.
_PR_SET_PDEATHSIG = 1


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


def end_with_ray(settings: Settings) -> None:
    """End this replica with the node that started it; Ray leaves one that answers calls behind.

    On a cluster a replica is in a container that ends with its node.
    """
    if settings.loopback_only and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def keep_libraries_quiet() -> None:
    """Keep OpenVINO from reporting each conversion to its makers, and torch from advertising its successor.

    Without its telemetry package, which has no switch but a file in the user's home, OpenVINO uses a stub.
    """
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")


def give_way(niceness: int) -> None:
    """Let threads that accept, refuse and answer calls run before this one and those that it starts, which compute.

    A forward on all cores would otherwise hold back the gateway, and calls would wait at the door, neither let in nor
    refused, while the encoder is full.

    Parameters
    ----------
    niceness
        0 to 19, as of Unix. Linux has one for each thread; elsewhere nothing is done.
    """
    if niceness and sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def computing_thread(niceness: int) -> ThreadPoolExecutor:
    """Return one thread that gives way, as do those that libraries start in it."""
    return ThreadPoolExecutor(1, "compute", give_way, (niceness,))


def give_back_memory() -> None:
    """Return to the system what loading and warming up have freed; glibc by itself keeps it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
