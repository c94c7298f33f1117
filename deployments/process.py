"""What a replica does to its own process before and after it loads a model."""

from __future__ import annotations

import ctypes
import sys
import warnings
from contextlib import suppress
from typing import Any, cast

from deployments.settings import Settings


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


def give_back_memory() -> None:
    """Return to the system what loading and warming up have freed; glibc by itself keeps it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
