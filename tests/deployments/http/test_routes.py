"""Health and the description of the routes."""

from __future__ import annotations

from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deployments.gateway.services import DESCRIPTORS, IMAGING, SERVICES
from deployments.operations.settings import Settings
from tests.deployments.conftest import Open
from tests.deployments.http.conftest import ENCODE, Opened


async def test_health_says_what_grpcs_says(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        health = health_pb2_grpc.HealthStub(gateway.channel)
        for serving, status in ((True, 200), (False, 503)):
            await gateway.server.set_serving(serving)
            said = health_pb2.HealthCheckResponse.ServingStatus.Name(
                (await health.Check(health_pb2.HealthCheckRequest())).status
            )
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (status, said)
            assert set(ready.json()["services"]) == set(SERVICES)
            # A restart would not help, so what restarts is told that the process is alive.
            alive = await client.get("/healthz")
            assert (alive.status_code, alive.json()) == (200, ready.json())
        assert (await client.post("/readyz")).status_code == 405
        assert ready.json()["services"][IMAGING] == "NOT_SERVING"


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*(references(one) for one in value.values()))
    if isinstance(value, list):
        return set().union(*(references(one) for one in value))
    return set()


async def test_the_description_names_every_route_and_message(open_http: Opened) -> None:
    async with open_http() as (_, client):
        described = (await client.get("/openapi.json")).json()
    calls = {
        f"/{service.full_name}/{method.name}"
        for service in DESCRIPTORS
        for method in service.methods
        if not (method.client_streaming and method.server_streaming)
    }
    others = {
        "/v1/embeddings",
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{id}",
        "/healthz",
        "/readyz",
    }
    assert set(described["paths"]) == calls | others
    schemas = described["components"]["schemas"]
    assert references(described) == {f"#/components/schemas/{name}" for name in schemas}
    request = described["paths"][ENCODE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert request == {"$ref": "#/components/schemas/monofacet.v1.EncodeRequest"}
    assert set(schemas["monofacet.v1.EncodeRequest"]["properties"]) == {"inputs", "options", "bundle"}
    assert schemas["monofacet.v1.Tensor"]["properties"]["shape"]["items"]["type"] == "string"
    ids = [way["operationId"] for path in described["paths"].values() for way in path.values()]
    assert len(ids) == len(set(ids))


async def test_what_reflection_would_not_describe_is_not_described(open_http: Opened) -> None:
    async with open_http(reflection=False) as (_, client):
        assert (await client.get("/openapi.json")).status_code == 404


async def test_no_port_is_opened_where_http_is_off(open_gateway: Open) -> None:
    async with open_gateway(http=False) as gateway:
        assert gateway.server.http_port == 0


def test_a_free_port_is_taken_where_grpc_takes_one() -> None:
    assert Settings(port=0).http_port == 0
    assert Settings(port=0, http_port=8081).http_port == 8081
    assert Settings(port=9001).http_port == 8080
    assert Settings(port=8080).http_port == 0


def test_two_ports_of_one_number_are_refused() -> None:
    with pytest.raises(ValueError, match="http_port"):
        Settings(port=8080, http_port=8080)
    assert Settings(port=8080, http=False).port == 8080
