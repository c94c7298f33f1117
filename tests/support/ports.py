"""Ports for servers that must be told one before they start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Ray's workers take ports below it.
_FIRST = 20_000


def free_port() -> int:
    """Return a port that nobody listens on now, nor is given by chance before its server starts.

    Ports that the kernel hands out, to connections and to servers that ask for any, lie in a range of their own.
    """
    last = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    if last <= _FIRST:
        raise OSError(f"all ports from {_FIRST} on are handed out by the kernel")
    while True:
        port = random.SystemRandom().randrange(_FIRST, last)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
