"""OpenAI's routes, called by OpenAI's own client and by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import model_service_pb2

from tests.deployments.conftest import Gateway, array
from tests.deployments.http.conftest import JSON, Opened

EMBEDDINGS, IMAGES = "/v1/embeddings", "/v1/images/generations"


@asynccontextmanager
async def client_of(gateway: Gateway, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"http://127.0.0.1:{gateway.server.http_port}/v1"
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key=key, max_retries=0, http_client=httpx2.AsyncClient(trust_env=False)
    ) as client:
        yield client


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("form", ["float", "base64", None])
async def test_the_vectors_are_those_of_grpc(open_http: Opened, form: Any) -> None:
    texts = ["a cat", "a dog, asleep", "ein Hund"]
    async with open_http() as (gateway, _), client_of(gateway) as client:
        request = pb.EncodeRequest(inputs=[common.Input(text=text) for text in texts])
        expected = await gateway.features.Encode(request)
        given = {} if form is None else {"encoding_format": form}
        answer = await client.embeddings.create(model=expected.bundle, input=texts, **given)
    vectors = [
        np.frombuffer(base64.b64decode(one.embedding), "<f4")
        if isinstance(one.embedding, str)
        else one.embedding
        for one in answer.data
    ]
    assert np.allclose(vectors, array(expected.embeddings), rtol=0, atol=1e-6)
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.model == expected.bundle


async def test_images_and_texts_are_taken_as_other_servers_take_them(open_http: Opened) -> None:
    inputs = [
        "a",
        {"text": "a"},
        uri(b"png"),
        {"image": uri(b"png")},
        {"image": base64.b64encode(b"png").decode()},
    ]
    async with open_http() as (gateway, client):
        both = [common.Input(text="a"), common.Input(image=common.Image(data=b"png"))]
        expected = array((await gateway.features.Encode(pb.EncodeRequest(inputs=both))).embeddings)
        answer = (await client.post(EMBEDDINGS, json={"input": inputs})).json()
        found = np.array([one["embedding"] for one in answer["data"]])
        assert np.allclose(found, expected[[0, 0, 1, 1, 1]], rtol=0, atol=1e-6)
        one = (await client.post(EMBEDDINGS, json={"input": {"image": uri(b"png")}})).json()
        assert np.allclose(one["data"][0]["embedding"], expected[1], rtol=0, atol=1e-6)


async def test_more_inputs_than_one_call_takes_are_encoded_in_order(open_http: Opened) -> None:
    texts = [f"text {i}" for i in range(7)]
    async with open_http(max_items=3) as (gateway, client):
        many = (await client.post(EMBEDDINGS, json={"input": texts})).json()["data"]
        for i, text in enumerate(texts):
            one = await gateway.features.Encode(pb.EncodeRequest(inputs=[common.Input(text=text)]))
            assert np.allclose(many[i]["embedding"], array(one.embeddings)[0], rtol=0, atol=1e-6)


async def test_models_are_listed_and_found(open_http: Opened) -> None:
    async with open_http() as (gateway, _), client_of(gateway) as client:
        known = (await gateway.models.GetModel(model_service_pb2.GetModelRequest())).model
        assert [model.id async for model in client.models.list()] == [known.bundle]
        assert (await client.models.retrieve(known.bundle)).id == known.bundle
        assert (await client.models.retrieve(known.name)).id == known.bundle
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("text-embedding-3-small")
    assert (caught.value.code, caught.value.param) == ("UNKNOWN_MODEL", "model")


@pytest.mark.parametrize(
    ("body", "parameter", "code"),
    [
        ({"input": "a", "dimensions": 4}, "dimensions", "PARAMETER_UNSUPPORTED"),
        ({"input": [1, 2, 3]}, "input[0]", "TOKENS_UNSUPPORTED"),
        ({"input": [[1, 2], [3]]}, "input[0]", "TOKENS_UNSUPPORTED"),
        ({"input": []}, "input", "PARAMETER_INVALID"),
        ({}, "input", "PARAMETER_INVALID"),
        ({"input": ["a"] * 2_049}, "input", "PARAMETER_INVALID"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "PARAMETER_INVALID"),
        ({"input": "a", "encoding": "float"}, "encoding", "PARAMETER_UNSUPPORTED"),
        ({"input": {"image": "https://example.org/cat.png"}}, "input", "PARAMETER_INVALID"),
        ({"input": ["a", {"image": "%"}]}, "input[1]", "PARAMETER_INVALID"),
        ({"input": ["a", uri(b"bad")]}, "input[1].image.data", "IMAGE_CORRUPT"),
        ({"input": "a" * 101}, "input[0].text", "TEXT_TOO_LONG"),
        ({"input": "\ud800"}, "input", "PARAMETER_INVALID"),
        ({"input": "a", "\ud800": 1}, "?", "PARAMETER_UNSUPPORTED"),
        ({"input": "a", "model": 3}, "model", "PARAMETER_INVALID"),
        ([], "body", "PARAMETER_INVALID"),
    ],
)
async def test_a_bad_request_for_embeddings_names_its_parameter(
    open_http: Opened, body: Any, parameter: str, code: str
) -> None:
    async with open_http() as (_, client):
        # Written by hand: the client's own JSON holds no half of a surrogate pair.
        response = await client.post(EMBEDDINGS, content=json.dumps(body).encode(), headers=JSON)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", parameter, code)
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "parameter", "code"),
    [
        ({"prompt": "a", "response_format": "url"}, "response_format", "PARAMETER_UNSUPPORTED"),
        ({"prompt": "a", "stream": True}, "stream", "PARAMETER_UNSUPPORTED"),
        ({"prompt": "a", "n": 0}, "n", "PARAMETER_INVALID"),
        ({"prompt": "a", "n": True}, "n", "PARAMETER_INVALID"),
        ({"prompt": "a", "size": "big"}, "size", "PARAMETER_INVALID"),
        ({"prompt": "a", "size": "9000x9000"}, "size", "INVALID_INPUT"),
        ({"prompt": "a", "seed": -1}, "seed", "PARAMETER_INVALID"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed", "PARAMETER_INVALID"),
        ({"prompt": "a", "seed": 1, "seeds": ["2"]}, "seed", "PARAMETER_INVALID"),
        ({"prompt": "a", "steering": {"edit": []}}, "steering", "PARAMETER_INVALID"),
        ({"prompt": "a", "style": "vivid"}, "style", "PARAMETER_UNSUPPORTED"),
    ],
)
async def test_a_bad_request_for_images_names_its_parameter(
    open_http: Opened, body: Any, parameter: str, code: str
) -> None:
    async with open_http() as (_, client):
        response = await client.post(IMAGES, json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["param"], error["code"]) == (parameter, code)


async def test_a_bundle_without_a_pipeline_says_so(open_http: Opened) -> None:
    async with open_http() as (_, client):
        response = await client.post(IMAGES, json={"prompt": "a cat"})
    assert response.status_code == 501 and response.json()["error"]["code"] == "NO_PIPELINE"


async def test_a_failure_of_ours_is_told_without_its_text(open_http: Opened) -> None:
    async with open_http() as (_, client):
        response = await client.post(EMBEDDINGS, json={"input": uri(b"surprise")})
    assert response.status_code == 500 and "secret" not in response.text
    assert response.json()["error"]["code"] == "INTERNAL"


@pytest.mark.parametrize("path", [EMBEDDINGS, IMAGES])
async def test_only_json_is_taken_by_the_right_method(open_http: Opened, path: str) -> None:
    async with open_http() as (_, client):
        # What a form or a script of another page may send without asking.
        refused = await client.post(path, content=b'{"input": "a"}', headers={"content-type": "text/plain"})
        assert refused.status_code == 415
        assert (await client.get(path)).status_code == 405
        assert (await client.post("/v1/models")).status_code == 405
        for body in (b"", b"{", b"\xff", b"[" * 100_000):
            bad = await client.post(path, content=body, headers=JSON)
            assert (bad.status_code, bad.json()["error"]["code"]) == (400, "REQUEST_MALFORMED")
        missing = await client.post("/v1/chat/completions", json={})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "UNKNOWN_ROUTE")
