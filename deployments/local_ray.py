"""Ray on one machine, without the processes that a cluster of one node has no use for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
