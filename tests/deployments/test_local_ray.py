"""A private Ray. What `fewer_processes` takes is internal: a Ray that has renamed it must fail here, not at a start."""

from __future__ import annotations

import inspect
import queue
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import ray_constants
from ray._private.node import Node

from deployments.cluster import local_ray
from deployments.cluster.local_ray import (
    dead_children,
    fewer_processes,
    make_private,
    stop_forwarding,
    watch_ray,
)
from deployments.operations.environment import ENVIRONMENT, ONE_MACHINE, PRIVATE, REPLICA_ENVIRONMENT

METHODS = ("start_monitor", "start_api_server")


def methods() -> list[Callable[..., Any]]:
    return [getattr(Node, name) for name in METHODS]


def parameters(method: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(one.name, one.kind) for one in inspect.signature(method).parameters.values()]


def test_ray_has_the_methods_with_the_parameters_that_the_patch_has() -> None:
    own = methods()
    with fewer_processes():
        patched = methods()
    for ours, rays in zip(patched, own, strict=True):
        assert ours is not rays
        assert parameters(ours) == parameters(rays)


def test_a_patched_node_starts_nothing_and_has_the_address_of_no_dashboard() -> None:
    # Without a session: a method that did start something would miss it.
    node = Node.__new__(Node)
    with fewer_processes():
        node.start_monitor()
        node.start_api_server(include_dashboard=False, raise_on_failure=True)
    assert node.webui_url == ""


def test_after_the_start_ray_has_its_own_methods_again() -> None:
    own = methods()
    with fewer_processes():
        pass
    assert methods() == own


def test_after_a_start_that_failed_ray_has_its_own_methods_again() -> None:
    own = methods()
    with pytest.raises(RuntimeError, match="no start"), fewer_processes():
        raise RuntimeError("no start")
    assert methods() == own


def test_nothing_of_another_ray_comes_in_and_the_users_own_settings_stay() -> None:
    foreign = {
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_RUNTIME_ENV_HOOK": "their.hook",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}",
        "RAY_REDIS_ADDRESS": "10.0.0.1:6379",
        "RAY_AUTH_TOKEN_PATH": "/nowhere",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
    }
    kept = {"RAY_worker_niceness": "3", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1", "PATH": "/bin"}
    overruled = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1", "RAY_AUTH_TOKEN": "known"}
    environment = {**foreign, **kept, **overruled}
    assert set(make_private(environment)) == set(foreign) | set(overruled)
    assert not set(foreign) & set(environment)
    assert environment.items() >= kept.items()
    assert environment.items() >= PRIVATE.items()
    first = environment["RAY_AUTH_TOKEN"]
    assert len(first) == 64
    make_private(environment)
    assert environment["RAY_AUTH_TOKEN"] != first


def test_ray_knows_every_variable_that_it_is_told() -> None:
    """One that a new version has renamed would be ignored without a word."""
    folder = Path(ray.__file__).parent
    binary = (folder / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    sources = b"".join(path.read_bytes() for path in (folder / "_private").rglob("*.py"))
    sources += b"".join(path.read_bytes() for path in (folder / "_common").rglob("*.py"))
    sources += b"".join(path.read_bytes() for path in (folder / "serve" / "_private").rglob("*.py"))
    sources += b"".join(path.read_bytes() for path in (folder / "dashboard").rglob("*.py"))
    for name in {*ENVIRONMENT, *ONE_MACHINE, *PRIVATE, *REPLICA_ENVIRONMENT}:
        if name.startswith(("RAY_", "SERVE_", "REPORTER_")):
            assert name.encode() in binary + sources, name
    assert hasattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV")


def test_the_death_of_one_of_rays_own_processes_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray, "_VITAL", ("python3", Path(sys.executable).resolve().name, "python"))
    told: queue.Queue[str] = queue.Queue()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch_ray(told.put, period_s=0.01)
    assert dead_children() == []
    assert told.empty()
    child.kill()
    try:
        assert told.get(timeout=60) in local_ray._VITAL
    finally:
        child.wait()
    assert dead_children() == []


def test_ray_prints_through_the_handler_that_is_taken_away() -> None:
    """A Ray that has renamed it would go on printing."""
    from ray._private import worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    assert re.search(r'add_handler\(\s*"ray_print_logs"', inspect.getsource(worker))
    told: list[object] = []
    dispatcher.add_handler("ray_print_logs", told.append)
    dispatcher.emit("before")
    stop_forwarding()
    dispatcher.emit("after")
    assert told == ["before"]
