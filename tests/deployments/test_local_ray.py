"""What `fewer_processes` takes from Ray is private: a Ray that has renamed it must fail here and not at a start."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from ray._private.node import Node

from deployments.local_ray import fewer_processes

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
