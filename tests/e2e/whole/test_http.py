"""HTTP of a whole service: OpenAI's client against the embedded models, and what the port says of itself."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from pathlib import Path

import numpy as np
import openai
import PIL.Image
import pytest
from monofacet import Client, SteeringEdit

from services.bundle.load import Bundle
from tests.support.service import Service


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.http_url}/v1", api_key="none")


def test_the_vectors_of_pictures_and_texts_are_those_of_grpc(
    service: Service, bundle: Bundle, client: openai.OpenAI
) -> None:
    picture = bundle.path / "samples" / "0.png"
    uri = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    with Client(service.target) as grpc:
        expected = grpc.encode([Path(picture), "a red heart"]).embeddings
    answer = client.embeddings.create(model=service.bundle, input=[uri, "a red heart"])
    assert np.allclose([one.embedding for one in answer.data], expected, rtol=0, atol=1e-6)
    assert [model.id for model in client.models.list()] == [service.bundle]


def test_a_steered_picture_is_that_of_grpc(service: Service, client: openai.OpenAI) -> None:
    with Client(service.target) as grpc:
        edit = SteeringEdit("text", scale=2.0)
        (expected,) = grpc.generate("woman cook", seeds=[7], edits=[edit]).images
    steering = {"edits": [{"label": "MODALITY_LABEL_TEXT", "scale": 2}]}
    answer = client.images.generate(prompt="woman cook", extra_body={"seed": 7, "steering": steering})
    assert answer.data is not None
    # The pixels: what a picture carries of its request is as its caller wrote it.
    with PIL.Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))) as image:
        assert image.convert("RGB").tobytes() == expected.image.convert("RGB").tobytes()


@pytest.mark.parametrize("size", ["60x64", "4000x4000"])
def test_a_size_that_the_pipeline_cannot_make_is_blamed(client: openai.OpenAI, size: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", extra_body={"size": size})
    assert caught.value.param == "size"


def test_the_port_says_that_it_serves(service: Service) -> None:
    with urllib.request.urlopen(f"{service.http_url}/readyz") as response:
        assert json.load(response)["status"] == "SERVING"
