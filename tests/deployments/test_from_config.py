"""The application as a cluster's Serve config builds it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from deployments.cluster.app import GatewayReplica, from_config, placed, scaled
from services.bundle.load import Bundle
from services.errors import BundleError
from tests.support.waiting import PATIENCE_S


def test_serve_builds_the_application_from_settings_by_name(tiny: Bundle) -> None:
    arguments = {"bundle": str(tiny.path), "gateway_replicas": 3, "gateway_resource": "gateway"}
    built: Any = call_user_app_builder_with_args_if_necessary(from_config, arguments)
    gateway = built._bound_deployment
    assert gateway.num_replicas == 3
    assert gateway._replica_config.max_replicas_per_node == 1
    assert gateway.ray_actor_options == {"num_cpus": 0, "resources": {"gateway": 1}}


def test_a_name_that_is_no_setting_stops_it(tiny: Bundle) -> None:
    with pytest.raises(ValueError, match="no such settings: gateways"):
        from_config({"bundle": str(tiny.path), "gateways": 3})


def test_a_bundle_that_was_changed_stops_it(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        from_config({"bundle": str(tmp_path)})


def test_replicas_are_fixed_unless_there_may_be_more() -> None:
    assert scaled(2, 0, 1.5) == scaled(2, 2, 1.5) == {"num_replicas": 2}
    auto = scaled(2, 8, 1.5)["autoscaling_config"]
    assert (auto["min_replicas"], auto["max_replicas"], auto["target_ongoing_requests"]) == (2, 8, 1.5)


def test_what_is_not_asked_for_is_not_reserved() -> None:
    assert placed(0, 0, "") == {"num_cpus": 0}
    assert placed(4, 1, "encoder") == {"num_cpus": 4, "num_gpus": 1, "resources": {"encoder": 1}}


async def test_a_gateway_drains_once_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.cluster.app._DRAIN_POLL_S", 0.01)
    drained = asyncio.Event()

    class Server:
        async def drain(self) -> bool:
            drained.set()
            return True

    gateway: Any = GatewayReplica.__new__(GatewayReplica)
    gateway._server = Server()
    watching = asyncio.create_task(gateway._drain_once_there(tmp_path / "drain"))
    await asyncio.sleep(0.05)
    assert not drained.is_set()
    (tmp_path / "drain").touch()
    await asyncio.wait_for(watching, PATIENCE_S)
    assert drained.is_set()
    # The replica's own end drains as well; here there is nothing left to do.
    del gateway._server
