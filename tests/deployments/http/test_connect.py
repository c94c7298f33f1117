"""Connect, gRPC-Web and JSON: each kind of call, and what the protocols' framing may hold."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb

from deployments.gateway.services import DESCRIPTORS
from tests.deployments.conftest import array, error_details
from tests.deployments.http.conftest import (
    ENCODE,
    GENERATE,
    JSON,
    SCORE,
    Opened,
    enveloped,
    envelopes,
    reason_of,
)
from tests.support.waiting import until

REQUEST = {"inputs": [{"text": "a"}, {"text": "b"}]}
MESSAGE = pb.EncodeRequest(inputs=[common.Input(text="a"), common.Input(text="b")])
STREAM = {"content-type": "application/connect+json"}


async def test_json_answers_what_grpc_answers(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        expected = await gateway.features.Encode(MESSAGE)
        response = await client.post(ENCODE, json=REQUEST, headers={"x-request-id": "mine"})
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"] == "mine"
        tensor = response.json()["embeddings"]
        found = np.frombuffer(base64.b64decode(tensor["data"]), "<f4").reshape(
            [int(n) for n in tensor["shape"]]
        )
        assert np.array_equal(found, array(expected.embeddings))
        assert response.json()["bundle"] == expected.bundle
        # One chain: both are counted as calls of the same method.
        assert (
            gateway.sample(
                "monofacet_request_duration_seconds_count",
                method=ENCODE[1:], code="OK", bundle=expected.bundle,
            )
            == 2
        )  # fmt: skip


async def test_connect_takes_protocol_buffers(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        expected = await gateway.features.Encode(MESSAGE)
        headers = {"content-type": "application/proto", "connect-protocol-version": "1"}
        response = await client.post(ENCODE, content=MESSAGE.SerializeToString(), headers=headers)
        answer = pb.EncodeResponse.FromString(response.content)
        assert np.array_equal(array(answer.embeddings), array(expected.embeddings))
        packed = await client.post(
            ENCODE,
            content=gzip.compress(MESSAGE.SerializeToString()),
            headers={**headers, "content-encoding": "gzip"},
        )
        assert pb.EncodeResponse.FromString(packed.content).embeddings == answer.embeddings


async def test_grpc_web_is_framed_with_its_trailers(open_http: Opened) -> None:
    async with open_http() as (_, client):
        headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
        body = MESSAGE.SerializeToString()
        response = await client.post(ENCODE, content=struct.pack(">BI", 0, len(body)) + body, headers=headers)
        (flags, message), (last_flags, trailers) = envelopes(response.content)
        assert (flags, last_flags) == (0, 0x80)
        assert len(pb.EncodeResponse.FromString(message).norms) == 2
        assert b"grpc-status: 0" in trailers.lower()

        refused = await client.post(ENCODE, content=struct.pack(">BI", 0, 0), headers=headers)
        assert refused.status_code == 200
        said = str(dict(refused.headers)) + str(refused.content)
        assert "grpc-status': '3'" in said or "grpc-status: 3" in said
        assert "grpc-status-details-bin" in said


async def test_an_error_has_the_code_and_the_details_of_grpc(open_http: Opened) -> None:
    bad = {"inputs": [{"text": "a"}, {"image": {"data": base64.b64encode(b"bad").decode()}}]}
    async with open_http() as (gateway, client):
        request = pb.EncodeRequest(
            inputs=[common.Input(text="a"), common.Input(image=common.Image(data=b"bad"))]
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(request)
        response = await client.post(ENCODE, json=bad)
    reason, fields, _ = error_details(caught.value)
    assert response.status_code == 400
    error = response.json()
    assert (error["code"], error["message"]) == ("invalid_argument", caught.value.details())
    assert reason_of(error) == reason == "IMAGE_CORRUPT"
    (details,) = [d for d in error["details"] if d["type"] == "google.rpc.BadRequest"]
    assert fields[0].encode() in base64.b64decode(details["value"] + "===")


async def test_a_server_stream_ends_with_its_status(open_http: Opened) -> None:
    async with open_http() as (_, client):
        response = await client.post(GENERATE, content=enveloped({"prompt": "a cat"}), headers=STREAM)
        assert response.status_code == 200
        ((flags, end),) = envelopes(response.content)
        assert flags == 2
        # The small bundle has no pipeline; tests/e2e streams pictures.
        assert json.loads(end)["error"]["code"] == "unimplemented"
        assert reason_of(json.loads(end)["error"]) == "NO_PIPELINE"


async def test_a_client_stream_is_answered_once(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        response = await client.post(SCORE, content=enveloped({"nothing": 1}), headers=STREAM)
        ((_, end),) = envelopes(response.content)
        assert json.loads(end)["error"]["code"] == "invalid_argument"
        assert reason_of(json.loads(end)["error"]) == "REQUEST_MALFORMED"
        assert gateway.sample("monofacet_requests_in_flight", method=SCORE[1:]) == 0


async def test_a_call_that_streams_both_ways_is_refused_with_the_reason(open_http: Opened) -> None:
    async with open_http() as (_, client):
        stream = "/monofacet.v1.FeatureService/StreamEncode"
        response = await client.post(
            stream, content=enveloped({"item": {"input": {"text": "a"}}}), headers=STREAM
        )
        ((_, end),) = envelopes(response.content)
        error = json.loads(end)["error"]
        assert error["code"] == "unimplemented" and reason_of(error) == "STREAM_NEEDS_HTTP2"
        assert "gRPC" in error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "object"),
        (b'{"input": []}', 'no field named \\"input\\"'),
        (b'{"inputs": 3}', "not the request"),
        (b'{"inputs": [{"text": "\xff"}]}', "not JSON"),
        (b'{"inputs": [{"image": {"data": 3}}]}', "not the request"),
        (b"[" * 100_000, "deeply"),
        (b"[" + b"{}," * 300_000 + b"{}]", "parts"),
    ],
)
async def test_what_is_not_the_request_is_refused(open_http: Opened, body: bytes, said: str) -> None:
    async with open_http() as (_, client):
        response = await client.post(ENCODE, content=body, headers=JSON)
        assert response.status_code == 400
        assert reason_of(response.json()) == "REQUEST_MALFORMED"
        assert said in response.text


@pytest.mark.parametrize("header", ["connect-timeout-ms", "grpc-timeout"])
async def test_a_deadline_is_the_callers(open_http: Opened, header: str) -> None:
    async with open_http() as (gateway, client):
        gateway.model.hold()
        response = await client.post(
            ENCODE,
            json=REQUEST,
            headers={header: {"connect-timeout-ms": "50", "grpc-timeout": "50m"}[header]},
        )
        gateway.model.release()
        assert response.status_code == 504
        assert response.json()["code"] == "deadline_exceeded"
        assert reason_of(response.json()) == "DEADLINE_EXCEEDED"


async def test_a_caller_who_goes_ends_the_call(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        gateway.model.hold()
        calling = asyncio.create_task(client.post(ENCODE, json=REQUEST))
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=ENCODE[1:]) == 1)
        calling.cancel()
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=ENCODE[1:]) == 0)
        cancelled = {"method": ENCODE[1:], "code": "CANCELLED"}
        # Which bundle it was for is known once its request was read.
        counted: list[Any] = [
            sample.value
            for metric in gateway.server.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "monofacet_request_duration_seconds_count"
            and cancelled.items() <= sample.labels.items()
        ]
        assert sum(counted) == 1
        gateway.model.release()


async def test_grpc_itself_is_sent_to_its_own_port(open_http: Opened) -> None:
    async with open_http() as (_, client):
        response = await client.post(ENCODE, content=b"", headers={"content-type": "application/grpc"})
        assert response.status_code == 415 and "HTTP/2" in response.json()["message"]


async def test_every_call_of_the_contract_is_there(open_http: Opened) -> None:
    async with open_http() as (_, client):
        for service in DESCRIPTORS:
            for method in service.methods:
                response = await client.get(f"/{service.full_name}/{method.name}")
                assert response.status_code == 405, method.name
        assert (await client.post("/monofacet.v1.FeatureService/NoSuchCall", json={})).status_code == 404


async def test_a_server_that_starts_says_so(open_http: Opened) -> None:
    async with open_http() as (gateway, client):
        gateway.server._admission.open = False
        response = await client.post(ENCODE, json=REQUEST)
        assert response.status_code == 503
        assert reason_of(response.json()) == "MODEL_STARTING"
        assert int(response.headers["retry-after"]) >= 1
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(MESSAGE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
