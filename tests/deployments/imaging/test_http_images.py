"""Pictures over HTTP: OpenAI's route and the stream of the contract, on a debug pipeline."""

from __future__ import annotations

import asyncio
import base64
import json
import struct

import httpx2
import openai
from monofacet.v1 import common_pb2
from monofacet.v1 import imaging_service_pb2 as pb

from tests.deployments.imaging.conftest import Gateway, Open, events
from tests.support.waiting import PATIENCE_S, until

STEERING = {"edits": [{"label": "MODALITY_LABEL_TEXT", "scale": 3}]}
EDIT = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT, scale=3.0)


def http(gateway: Gateway) -> httpx2.AsyncClient:
    base_url = f"http://127.0.0.1:{gateway.server.http_port}"
    return httpx2.AsyncClient(base_url=base_url, trust_env=False, timeout=PATIENCE_S)


async def test_openais_client_gets_the_pictures_of_grpc(open_gateway: Open) -> None:
    async with open_gateway() as gateway, http(gateway) as transport:
        request = pb.GenerateRequest(
            prompt="a", seeds=[7, 8], width=64, height=64, steering=pb.Steering(edits=[EDIT])
        )
        found = [r.image for r in await events(gateway.imaging.Generate(request)) if r.HasField("image")]
        expected = {image.seed: image for image in found}
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{gateway.server.http_port}/v1", api_key="none", http_client=transport
        )
        answer = await client.images.generate(
            model=gateway.bundle.id,
            prompt="a",
            n=2,
            size="64x64",
            extra_body={"seed": 7, "steering": STEERING},
        )
    assert answer.data is not None
    assert [base64.b64decode(one.b64_json or "") for one in answer.data] == [
        expected[seed].image.data for seed in (7, 8)
    ]
    extra = [one.model_extra or {} for one in answer.data]
    assert [(one["seed"], one["delta"]) for one in extra] == [(7, 0.5), (8, 0.5)]


async def test_a_generation_streams_as_it_is_made(open_gateway: Open) -> None:
    body = json.dumps({"prompt": "a", "seeds": ["7"]}).encode()
    async with open_gateway() as gateway, http(gateway) as client:
        response = await client.post(
            "/monofacet.v1.ImagingService/Generate",
            content=struct.pack(">BI", 0, len(body)) + body,
            headers={"content-type": "application/connect+json"},
        )
        frames, data = [], response.content
        while data:
            flags, size = struct.unpack(">BI", data[:5])
            frames.append((flags, json.loads(data[5 : 5 + size])))
            data = data[5 + size :]
        request = pb.GenerateRequest(prompt="a", seeds=[7])
        (expected,) = [
            r.image for r in await events(gateway.imaging.Generate(request)) if r.HasField("image")
        ]
    assert [flags for flags, _ in frames] == [0] * (len(frames) - 1) + [2]
    assert frames[-1][1] == {}
    assert [frame["progress"]["steps"] for _, frame in frames[:-2]] == [[1], [2], [3], [4]]
    image = frames[-2][1]["image"]
    assert base64.b64decode(image["image"]["data"]) == expected.image.data


async def test_a_caller_who_goes_stops_the_work(open_gateway: Open) -> None:
    method = "monofacet.v1.ImagingService/Generate"
    async with open_gateway() as gateway, http(gateway) as client:
        gateway.model.hold()
        drawing = asyncio.create_task(client.post("/v1/images/generations", json={"prompt": "a"}))
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=method) == 1)
        drawing.cancel()
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=method) == 0)
        gateway.model.release()
