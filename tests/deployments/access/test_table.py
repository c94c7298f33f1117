"""Every method of the contract, under every state of a token: the whole table."""

from __future__ import annotations

import importlib
import pkgutil
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import monofacet.v1
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deployments.access.scopes import SCOPES, MethodWithoutScope, Scope, allows, check_scopes, methods_of
from deployments.access.tokens import new_token
from deployments.gateway.services import DESCRIPTORS
from tests.deployments.conftest import Open, error_details
from tests.support.waiting import PATIENCE_S

CODE = grpc.StatusCode
LATER = datetime.now(UTC) + timedelta(hours=1)
EARLIER = datetime.now(UTC) - timedelta(seconds=1)


def contract() -> list[ServiceDescriptor]:
    """Return every service that any file of the contract describes."""
    found: list[ServiceDescriptor] = []
    for module in pkgutil.iter_modules(monofacet.v1.__path__):
        if module.name.endswith("_pb2"):
            descriptor = importlib.import_module(f"monofacet.v1.{module.name}").DESCRIPTOR
            found.extend(descriptor.services_by_name.values())
    return found


METHODS = [name for service in contract() for name in methods_of(service)]


def test_the_contract_is_walked() -> None:
    assert {"monofacet.v1.FeatureService/Encode", "monofacet.v1.ModelService/GetModel"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_contract_has_a_scope(method: str) -> None:
    assert method in SCOPES


def test_a_method_without_a_scope_stops_the_start() -> None:
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    with pytest.raises(MethodWithoutScope, match=r"grpc.health.v1.Health/Check"):
        check_scopes([*DESCRIPTORS, health])


@pytest.mark.parametrize("held", list(Scope))
@pytest.mark.parametrize("needed", list(Scope))
def test_admin_includes_everything_and_the_others_only_themselves(held: Scope, needed: Scope) -> None:
    assert allows([held], needed) == (held in (needed, Scope.ADMIN))


async def status_of(channel: aio.Channel, method: str, header: str | None) -> tuple[CODE, str]:
    """Call `method` with one empty message; return the code and the reason."""
    metadata = (("authorization", header),) if header is not None else ()
    # On the wire every call is a stream of messages. This kind sends its one message together with the headers:
    # a later write may fail if the call was refused before it, which hides the refusal (grpc/grpc#36066).
    call = channel.unary_stream(f"/{method}")(b"", metadata=metadata, timeout=PATIENCE_S)
    try:
        async for _ in call:
            pass
    except aio.AioRpcError as error:
        return error.code(), error_details(error)[0]
    return CODE.OK, ""


def other_scopes(needed: Scope) -> frozenset[Scope]:
    return frozenset(scope for scope in Scope if not allows([scope], needed))


async def test_every_method_answers_every_state_of_a_token_as_it_should(open_gateway: Open) -> None:
    tokens: dict[tuple[str, Scope], str] = {}
    lines = []
    for needed in Scope:
        for state, scopes, expires in (
            ("right", frozenset([needed]), LATER),
            ("expired", frozenset([needed]), EARLIER),
            ("wrong scope", other_scopes(needed), LATER),
        ):
            if scopes:
                tokens[state, needed], line = new_token("someone", scopes, expires)
                lines.append(line)
    wrong, _ = new_token("nobody", frozenset(Scope), None)
    refusals = {
        "none": (CODE.UNAUTHENTICATED, "TOKEN_MISSING"),
        "not a bearer": (CODE.UNAUTHENTICATED, "TOKEN_MISSING"),
        "wrong": (CODE.UNAUTHENTICATED, "TOKEN_UNKNOWN"),
        "expired": (CODE.UNAUTHENTICATED, "TOKEN_EXPIRED"),
        "wrong scope": (CODE.PERMISSION_DENIED, "SCOPE_MISSING"),
    }
    amiss, asked = [], 0
    async with open_gateway(tokens="\n".join(lines)) as gateway:
        for method in (name for service in DESCRIPTORS for name in methods_of(service)):
            needed = SCOPES[method]
            headers: dict[str, str | None] = {
                "none": None,
                "not a bearer": f"Basic {tokens['right', needed]}",
                "wrong": f"Bearer {wrong}",
                "expired": f"Bearer {tokens['expired', needed]}",
                "right": f"Bearer {tokens['right', needed]}",
                # The scheme's case does not matter (RFC 7235).
                "right, lower case": f"bearer {tokens['right', needed]}",
                "wrong scope": f"Bearer {tokens['wrong scope', needed]}",
            }
            for state, header in headers.items():
                asked += 1
                found = await status_of(gateway.channel, method, header)
                refused = found[0] in (CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED)
                good = found == refusals[state] if state in refusals else not refused
                if not good or found[0] is CODE.INTERNAL:
                    amiss.append((method, state, found))
    assert amiss == []
    assert asked == 7 * sum(len(service.methods) for service in DESCRIPTORS)


async def reflected(channel: Any, version: str, token: str | None = None) -> list[Any]:
    """Ask for the services by one version of reflection, without stubs: there are none for v1."""
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    return [answer async for answer in call(iter([request]), metadata=metadata)]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_health_asks_for_no_token_and_reflection_for_an_admins(
    open_gateway: Open, version: str
) -> None:
    reader, reader_line = new_token("reader", frozenset([Scope.READ, Scope.GENERATE]), None)
    admin, admin_line = new_token("admin", frozenset([Scope.ADMIN]), None)
    async with open_gateway(tokens=f"{reader_line};{admin_line}") as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for token, code in ((None, CODE.UNAUTHENTICATED), (reader, CODE.PERMISSION_DENIED)):
            with pytest.raises(aio.AioRpcError) as caught:
                await reflected(gateway.channel, version, token)
            assert caught.value.code() is code
        assert await reflected(gateway.channel, version, admin)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_can_be_switched_off(open_gateway: Open, version: str) -> None:
    async with open_gateway(reflection=False) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await reflected(gateway.channel, version)
    assert caught.value.code() is CODE.UNIMPLEMENTED


async def test_without_tokens_every_caller_may_call(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        assert (await status_of(gateway.channel, "monofacet.v1.ModelService/ListModels", None))[0] is CODE.OK
